"""What a model learns from: tasks, corpora, and the embedded demo."""
