"""ONNX files for tests, made node by node."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def denoiser(path, means, weights, variance, batch):
    """A file with the denoiser of a mixture of Gaussians of one variance on `Linear()`, from
    `level` `(batch, 1)` and `noisy` `(batch, d)` to `denoised`, in double precision.
    """
    means = np.asarray(means)
    dim = means.shape[1]
    constants = {
        "means": means[None],
        "log_weights": np.log(weights)[None],
        "variance": np.array(variance),
        "one": np.array(1.0),
        "half": np.array(-0.5),
        "middle": np.array([1]),
        "last": np.array([2]),
    }
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["level", "last"], ["t"]),
        node("Unsqueeze", ["noisy", "middle"], ["x"]),
        node("Sub", ["one", "t"], ["sigma"]),
        node("Mul", ["sigma", "sigma"], ["noise_variance"]),
        node("Mul", ["t", "t"], ["alpha2"]),
        node("Mul", ["alpha2", "variance"], ["data_variance"]),
        node("Add", ["data_variance", "noise_variance"], ["total"]),
        node("Mul", ["t", "means"], ["centers"]),
        node("Sub", ["x", "centers"], ["off"]),
        node("Mul", ["off", "off"], ["squares"]),
        node("Div", ["squares", "total"], ["scaled"]),
        node("ReduceSum", ["scaled", "last"], ["distances"], keepdims=0),
        node("Mul", ["distances", "half"], ["log_likelihoods"]),
        node("Add", ["log_likelihoods", "log_weights"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
        node("Unsqueeze", ["probabilities", "last"], ["posterior"]),
        node("Mul", ["t", "variance"], ["covariance"]),
        node("Div", ["covariance", "total"], ["gain"]),
        node("Mul", ["gain", "off"], ["moved"]),
        node("Add", ["means", "moved"], ["component_means"]),
        node("Mul", ["posterior", "component_means"], ["terms"]),
        node("ReduceSum", ["terms", "middle"], ["denoised"], keepdims=0),
    ]
    double = TensorProto.DOUBLE
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [value("level", double, [batch, 1]), value("noisy", double, [batch, dim])],
        [value("denoised", double, [batch, dim])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path
