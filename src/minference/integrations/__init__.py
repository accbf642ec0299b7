"""Host libraries: the only part that imports transformers and vllm."""
