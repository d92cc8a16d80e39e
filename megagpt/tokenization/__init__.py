"""Text to token ids and back: one interface over sentencepiece models, Hugging Face tokenizer.json and tiktoken ranks.

    path --declared--> which kind of file, and its special tokens --one of the three codecs--> Tokenizer

Special tokens are declared once: in the sentencepiece model itself, else in tokenizer_config.json beside the file.
"""
