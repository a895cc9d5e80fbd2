"""Text to ids and back: ``load`` (use one), ``train`` (make one), ``convert`` (give one to Hugging Face)."""
