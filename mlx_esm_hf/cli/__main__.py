from mlx_esm_hf.cli import app

app()
