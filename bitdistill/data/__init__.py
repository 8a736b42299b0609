"""What it learns from: tasks, corpora, the embedded demo."""
