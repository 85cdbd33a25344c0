# %% [markdown]
# # Your first bilevel problem
#
# In twenty lines
#
# $$
# \min_x F(x)
# $$

# %%
import torch

print(torch.tensor(1.0) * 3)
