"""The network as it is trained (`network`), adapted (`lora`), made and sharded (`model_factory`),
with which weights it starts (`weight_init`), and the memory it needs (`memory`).
"""
