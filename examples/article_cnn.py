"""The network of the well-known Keras articles on facial expressions, with one import changed; then it is tested.

    python examples/article_cnn.py                   # on generated images, within a minute
    python examples/article_cnn.py faces --epochs 30 # on a folder of 7 folders of images, one for each expression

Choose the engine with KERAS_BACKEND=jax, torch or tensorflow.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from keras.layers import Conv2D, Dense, Dropout, Flatten, MaxPooling2D
from keras.models import Sequential
from keras.optimizers import Adam

from evennorm.keras import BatchNormalization  # the articles: from keras.layers import BatchNormalization

SIZE, CLASSES = (48, 48), 7
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif"}


def load_images(folder):
    """Images (N, 48, 48, 1) of 0 to 255 and labels 0 to 6, from one folder for each class."""
    classes = sorted(path for path in Path(folder).iterdir() if path.is_dir()) if Path(folder).is_dir() else []
    files = [
        (path, label) for label, name in enumerate(classes) for path in sorted(name.iterdir()) if path.suffix in SUFFIXES
    ]
    if len(classes) != CLASSES or not files:
        raise SystemExit(
            f"{folder}: {CLASSES} folders of images are needed, one for each class; "
            f"found {len(classes)} folders, {len(files)} images"
        )
    images = [keras.utils.load_img(path, color_mode="grayscale", target_size=SIZE) for path, _ in files]
    return np.stack([keras.utils.img_to_array(image) for image in images]), np.array([label for _, label in files])


def generate_images(count, rng):
    """Stripes in one of 7 directions, with noise, as images (N, 48, 48, 1) of 0 to 255 and labels 0 to 6."""
    labels = rng.integers(0, CLASSES, count)
    angle, phase = (labels * np.pi / CLASSES)[:, None, None], rng.uniform(0, 2 * np.pi, (count, 1, 1))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    stripes = 128 + 64 * np.sin(0.6 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return np.clip(stripes + rng.normal(0, 25, stripes.shape), 0, 255)[..., None].astype("float32"), labels


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", help="a folder of 7 class folders of images; generated images without it")
parser.add_argument("--epochs", type=int, default=3, help="passes over the training images (3)")
parser.add_argument("--batch-size", type=int, help="images in a training step (64 from a folder, 8 generated ones)")
parser.add_argument("--images", type=int, default=500, help="how many images to generate (500)")
args = parser.parse_args()
# Testing uses moving averages, which at a momentum of 0.99 arrive after some hundred steps: of few images, small batches.
batch_size = args.batch_size or (64 if args.folder else 8)

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x, labels = load_images(args.folder) if args.folder else generate_images(args.images, rng)
y = keras.utils.to_categorical(labels, CLASSES)
order = rng.permutation(len(x))
train, test = np.split(order, [len(x) * 4 // 5])

model = Sequential()
model.add(Conv2D(32, kernel_size=(3, 3), activation="relu", input_shape=(48, 48, 1)))
model.add(Conv2D(64, kernel_size=(3, 3), activation="relu"))
model.add(BatchNormalization())
model.add(MaxPooling2D(pool_size=(2, 2)))
model.add(Dropout(0.25))
model.add(Conv2D(128, kernel_size=(3, 3), activation="relu"))
model.add(MaxPooling2D(pool_size=(2, 2)))
model.add(BatchNormalization())
model.add(Conv2D(128, kernel_size=(3, 3), activation="relu"))
model.add(MaxPooling2D(pool_size=(2, 2)))
model.add(Dropout(0.25))
model.add(Flatten())
model.add(BatchNormalization())
model.add(Dense(1024, activation="relu"))
model.add(Dropout(0.5))
model.add(Dense(7, activation="softmax"))

model.compile(loss="categorical_crossentropy", optimizer=Adam(learning_rate=0.0001), metrics=["accuracy"])
model.fit(x[train], y[train], batch_size=batch_size, epochs=args.epochs, validation_data=(x[test], y[test]), verbose=2)
loss, accuracy = model.evaluate(x[test], y[test], verbose=0)
print(f"{keras.backend.backend()}: accuracy {accuracy:.3f} on {len(test)} images not trained on, loss {loss:.3f}")
