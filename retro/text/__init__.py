"""Text in: documents, the tokenizer, chunks of tokens, prompts."""
