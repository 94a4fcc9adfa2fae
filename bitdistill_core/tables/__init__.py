"""The paper's tables and figures: cells (model, task, method, seed), their results, and what is drawn from them."""
