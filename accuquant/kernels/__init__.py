"""How a quantized layer's product is computed: one backend a file, and `select`, which chooses among them."""
