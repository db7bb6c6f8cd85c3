"""qc: a quantization compiler for large language models."""
