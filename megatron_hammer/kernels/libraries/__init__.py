"""Operations of other libraries: Transformer Engine, flash-attn, apex, Liger; each imported only where it is used."""
