"""Bundle to video latents: the half of the project that runs on the device.

    engine = load_engine("bundle")
    z_0 = sample(engine, latents, text, Schedule.uniform(4))

It needs numpy and one backend's runtime. It imports neither torch nor diffusers, and a test checks
that. `engine` defines what a backend is, `registry` finds one, `sampler` is the only sampling loop,
`validation` compares two engines. Each backend is a folder: `onnxruntime`, `tensorrt`,
`aotinductor`, `torch_tensorrt`.
"""
