"""Ask Triton for a video, chunk by chunk: `python examples/triton_client.py 127.0.0.1:8001 "a red
fox in the snow" fox.mp4`.

The server runs a repository that `anyflow-triton` wrote. It needs `pip install
'tritonclient[grpc]'`.
"""

import queue
import sys
from pathlib import Path

import numpy as np
from tritonclient import grpc

server, prompt, output = sys.argv[1:]


def tensor(name: str, kind: str, value: np.ndarray) -> grpc.InferInput:
    """Make an input of the request."""
    request_input = grpc.InferInput(name, value.shape, kind)
    request_input.set_data_from_numpy(value)
    return request_input


request = [
    tensor("prompt", "BYTES", np.array([prompt.encode()], dtype=object)),
    tensor("num_inference_steps", "INT32", np.array([4], dtype=np.int32)),
    tensor("seed", "INT64", np.array([0], dtype=np.int64)),
    tensor("output_type", "BYTES", np.array([b"mp4"], dtype=object)),  # bytes, not base64
]
answers: queue.Queue = queue.Queue()
with grpc.InferenceServerClient(server) as client, Path(output).open("wb") as file:
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("anyflow", request, enable_empty_final_response=True)
    while True:
        result, error = answers.get()
        if error is not None:
            raise error
        if result.as_numpy("mp4") is None:  # the last response is empty
            break
        file.write(result.as_numpy("mp4")[0])  # the file is playable from the first chunk on
        print(f"chunk {result.as_numpy('chunk')[0]} after {result.as_numpy('seconds')[0]:.2f} s")
