"""What a ternary model is: layers, quantizers, embeddings, surgery, loading."""
