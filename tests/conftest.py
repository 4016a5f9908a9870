"""The strictest configuration there is: what passes here passes anywhere.

float64 is on (single precision is asked for explicitly where it is tested), implicit rank and dtype promotion are
errors, and so are warnings (pyproject.toml).
"""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
