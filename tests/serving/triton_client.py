"""What a user of tritonclient does, unchanged, for test_oip.py: in an interpreter of its own, for its pins clash with ours.

python triton_client.py HTTP_HOST:PORT GRPC_HOST:PORT LATENTS.npz OUT.npz
"""

import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http

http_url, grpc_url, latents, out = sys.argv[1:]
given = np.load(latents)
answers = {}
for name, kind, url in (("http", tritonclient.http, http_url), ("grpc", tritonclient.grpc, grpc_url)):
    with kind.InferenceServerClient(url) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("clothes") and client.is_model_ready("clothes", "v1")
        options = {} if name == "http" else {"as_json": True}
        assert client.get_server_metadata(**options)["name"] == "ganwatch"
        metadata = client.get_model_metadata("clothes", **options)
        assert [i["name"] for i in metadata["inputs"]] == ["z", "y"], metadata
        index = client.get_model_repository_index(**options)
        names = [model["name"] for model in (index if name == "http" else index["models"])]
        assert names == ["clothes", "digits", "ring"], index
        config = client.get_model_config("clothes", **options)
        first = (config if name == "http" else config["config"])["input"][0]
        assert first == {"name": "z", "data_type": "TYPE_FP32", "dims": [-1, 16] if name == "http" else ["-1", "16"]}, config
        z = kind.InferInput("z", given["z"].shape, "FP32")
        z.set_data_from_numpy(given["z"])
        y = kind.InferInput("y", given["y"].shape, "INT64")
        y.set_data_from_numpy(given["y"])
        answer = client.infer("clothes", [z, y], request_id="7")
        answers[f"{name}_both"] = answer.as_numpy("samples")
        response = answer.get_response()
        assert (response["id"] if name == "http" else response.id) == "7"
        asked = [kind.InferRequestedOutput("samples")]
        answers[f"{name}_drawn"] = client.infer("clothes", [z], model_version="v1", outputs=asked).as_numpy("samples")
        if name == "http":
            z.set_data_from_numpy(given["z"], binary_data=False)
            y.set_data_from_numpy(given["y"], binary_data=False)
            asked = [kind.InferRequestedOutput("samples", binary_data=False)]
            for algorithm in ("gzip", "deflate"):
                answers[f"http_{algorithm}"] = client.infer("clothes", [z, y], request_compression_algorithm=algorithm).as_numpy("samples")
            answers["http_text"] = client.infer("clothes", [z, y], outputs=asked).as_numpy("samples")
        for model, version, words in (("nothing", "", "unknown model"), ("clothes", "v9", "unknown version")):
            try:
                client.infer(model, [z], model_version=version)
                raise AssertionError("answered")
            except tritonclient.utils.InferenceServerException as error:
                assert words in error.message(), error.message()
with tritonclient.grpc.InferenceServerClient(grpc_url) as client:  # 4 MB each way, which is more than gRPC takes by itself
    z = tritonclient.grpc.InferInput("z", [65536, 16], "FP32")
    z.set_data_from_numpy(np.resize(given["z"], (65536, 16)))
    answers["grpc_large"] = client.infer("clothes", [z]).as_numpy("samples")
np.savez(out, **answers)
print("done")
