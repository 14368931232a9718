"""AdaCS, the adaptive cold start (method.md, section 4; the paper's section 3.1)."""
