"""Makes Keras files and Keras's own predictions; run by test_keras_source in a process of its own.

``python keras_nets.py FOLDER`` writes for each net ``NAME.npz`` (images NHWC, scores) beside its
files. Keras runs on its torch backend.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import h5py
import keras
import numpy as np
import torch
from keras import applications, layers
from keras.src.applications.convnext import ConvNeXt
from keras.src.applications.densenet import DenseNet
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from keras.src.legacy.saving import legacy_h5_format

NARROW = 4
VGG16_BLOCKS = (2, 2, 3, 3, 3)


def sequential():
    """What the VGG kind has: padded and strided convolutions, pools, batch norm, dense layers."""
    return keras.Sequential(
        [
            layers.Input((24, 24, 3)),
            layers.Conv2D(6, 3, padding="same", activation="relu", name="conv_a"),
            layers.MaxPooling2D(),
            layers.BatchNormalization(name="norm_a"),
            layers.Conv2D(8, 3, activation="relu"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(10, activation="relu"),
            layers.Dropout(0.5),
            layers.BatchNormalization(),
            layers.Dense(5, activation="softmax", name="scores"),
        ]
    )


def functional():
    """Branches, padding apart, scaling inside the model, a global pool and a sigmoid."""
    image = layers.Input((20, 20, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(image)
    x = layers.ZeroPadding2D(((1, 2), (2, 1)))(x)
    x = layers.Conv2D(6, 3, use_bias=False)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.Activation("relu")(x)
    a = layers.Conv2D(6, 3, padding="same")(x)
    b = layers.Conv2D(6, 1)(x)
    x = layers.Concatenate()([layers.Add()([a, b]), b])
    x = layers.ReLU(max_value=6.0)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(1, activation="sigmoid")(x))


def strided():
    """Padding that differs at both ends, on an image that is no square."""
    return keras.Sequential(
        [
            layers.Input((25, 32, 3)),
            layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0]),
            layers.Conv2D(6, 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(6, 4, padding="same", activation="elu"),
            layers.MaxPooling2D(2, padding="same"),
            layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="gelu"),
            layers.AveragePooling2D(2, padding="same"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(4),
            layers.Softmax(),
        ]
    )


def nested():
    """A trained trunk within a new model, as in transfer learning."""
    image = layers.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, activation="relu", name="inner")(image)
    x = layers.BatchNormalization(name="inner_norm")(x)
    trunk = keras.Model(image, layers.MaxPooling2D()(x), name="trunk")
    trunk.trainable = False
    return keras.Sequential(
        [layers.Input((16, 16, 3)), trunk, layers.Flatten(), layers.Dense(3, name="outer")]
    )


def grey():
    """One channel, and convolutions in place of dense layers."""
    return keras.Sequential(
        [
            layers.Input((12, 12, 1)),
            layers.Conv2D(4, 3, activation="swish"),
            layers.MaxPooling2D(2),
            layers.Conv2D(6, 5, activation="tanh"),
            layers.Reshape((1, 1, 6)),
            layers.Dense(3, activation="softmax"),
            layers.Flatten(),
        ]
    )


def operations():
    """What ``inputs / 255.`` and ``preprocess_input(inputs)`` leave in a model."""
    image = layers.Input((18, 18, 3))
    x = image / 255.0
    x = keras.applications.resnet50.preprocess_input(x)  # RGB to BGR, and a constant per channel
    x = 1.0 - keras.ops.flip(x, axis=-1)[..., 0:3] * 0.01
    x = keras.applications.mobilenet_v2.preprocess_input(x)
    x = layers.Conv2D(6, 3)(keras.ops.abs(x) + 0.5)
    x = layers.LayerNormalization(epsilon=1e-3)(x)
    x = layers.Permute((3, 1, 2))(layers.MaxPooling2D(4)(x))
    return keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))


def shared():
    """Layers and a model that are called at two places each, and what joins the branches."""
    image = layers.Input((20, 20, 3))
    convolution = layers.Conv2D(4, 3, padding="same", activation="leaky_relu", name="twice")
    norm = layers.BatchNormalization(name="norm_twice")
    inner = layers.Input((20, 20, 4))
    block = layers.Conv2D(4, 1, activation="hard_sigmoid", name="in_block")(inner)
    block = keras.Model(inner, layers.PReLU(shared_axes=[1, 2])(block), name="block")
    a, b = norm(convolution(image)), norm(convolution(keras.ops.flip(image, axis=-1)))
    x = layers.Average()([block(a), block(b), layers.Subtract()([a, b])])
    x = layers.SeparableConv2D(6, 3, strides=2, depth_multiplier=2, padding="same")(x)
    x = layers.SeparableConv2D(5, 3, use_bias=False, activation="relu")(x)
    x = layers.Flatten(data_format="channels_first")(layers.MaxPooling2D(2)(x))
    return keras.Model(image, layers.PReLU()(layers.Dense(4)(x)))


def emotion():
    """The shape of the emotion model of `fer`: a small Xception on grey images."""
    image = layers.Input((64, 64, 1))
    x = image
    for filters in (4, 4):
        x = layers.Conv2D(filters, 3, use_bias=False)(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
    for filters in (6, 8, 10, 12):
        residual = layers.Conv2D(filters, 1, strides=2, padding="same", use_bias=False)(x)
        residual = layers.BatchNormalization()(residual)
        x = layers.SeparableConv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.SeparableConv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D(3, strides=2, padding="same")(layers.BatchNormalization()(x))
        x = layers.Add()([x, residual])
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(7, 3, padding="same")(x))
    return keras.Model(image, layers.Activation("softmax", name="predictions")(x))


def scaled():
    """The residual connection of InceptionResNetV2, whose scale is a layer of its own."""
    image = layers.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, activation="relu")(image)
    x = CustomScaleLayer(0.17)([x, layers.Conv2D(4, 1)(x)])
    return keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def convnext():
    """keras.applications.ConvNeXt with one block a stage."""
    return ConvNeXt((1, 1, 1, 1), (4, 6, 8, 10), weights=None, input_shape=(32, 32, 3), classes=5)


def densenet():
    return DenseNet([1, 1, 1, 1], weights=None, input_shape=(32, 32, 3), classes=5)


def mobilenet():
    return applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=5)


def mobilenetv2():
    return applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)


def vgg16(classes=1000, convolution="block{}_conv{}", dense=("fc1", "fc2", "predictions")):
    """VGG16 as keras.applications names it, of few channels; `classes` outputs."""
    net = keras.Sequential([layers.Input((32, 32, 3))], name="vgg16")
    for block, count in enumerate(VGG16_BLOCKS, 1):
        for i in range(1, count + 1):
            name = convolution.format(block, i)
            net.add(layers.Conv2D(NARROW, 3, padding="same", activation="relu", name=name))
        net.add(layers.MaxPooling2D(2, name=f"block{block}_pool"))
    net.add(layers.Flatten(name="flatten"))
    net.add(layers.Dense(8, activation="relu", name=dense[0]))
    net.add(layers.Dense(8, activation="relu", name=dense[1]))
    net.add(layers.Dense(classes, activation="softmax", name=dense[2]))
    return net


def randomised(net, seed=0):
    """The net with weights of every kind away from their beginnings."""
    numbers = np.random.default_rng(seed)
    for weight in net.weights:
        shape = tuple(weight.shape)
        if "variance" in weight.path:
            value = numbers.uniform(0.5, 2.0, shape)
        elif "count" in weight.path:
            continue
        else:
            fan_in = max(int(np.prod(shape[:-1])), 1) if len(shape) > 1 else 4
            value = numbers.normal(0, (2 / fan_in) ** 0.5, shape)
        weight.assign(value.astype("float32"))
    return net


def write_predictions(net, folder, name, scale=1.0):
    size = net.input_shape[1:]
    images = np.random.default_rng(1).uniform(0, scale, (2, *size)).astype("float32")
    scores = np.asarray(net.predict(images, verbose=0))
    np.savez(folder / f"{name}.npz", images=images, scores=scores)


def main(folder):
    torch.set_num_threads(1)
    scales = {"functional": 255.0, "operations": 255.0, "vgg16": 255.0}
    nets = (sequential, functional, strided, nested, grey, operations, shared, emotion, vgg16)
    nets += (scaled, convnext, densenet, mobilenet, mobilenetv2)
    for make in nets:
        name = make.__name__
        net = randomised(make())
        write_predictions(net, folder, name, scales.get(name, 1.0))
        net.save(folder / f"{name}.keras")
        net.save(folder / f"{name}.h5")
        net.save_weights(folder / f"{name}.weights.h5")
        with h5py.File(folder / f"{name}_only.h5", "w") as file:  # as keras.applications has them
            legacy_h5_format.save_weights_to_hdf5_group(file, net)
    few = randomised(vgg16(7, "convolution_{}_{}", ("first", "second", "third")))
    write_predictions(few, folder, "renamed")
    few.save_weights(folder / "renamed.weights.h5")
    with h5py.File(folder / "renamed_only.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, few)
    code = keras.Sequential([layers.Input((8, 8, 3)), layers.Lambda(lambda x: x)])
    code.add(layers.Flatten())
    code.save(folder / "code.keras")
    empty = keras.Sequential([layers.Input((8, 8, 3)), layers.Flatten()])
    empty.save_weights(folder / "empty.weights.h5")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
