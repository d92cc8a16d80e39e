"""Trained models to Hugging Face format and back: name tables, folder writer, tokenizer export, logits check."""
