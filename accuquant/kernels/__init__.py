"""How a quantized layer's product is computed: integer and float products, and what each device can be trusted with."""
