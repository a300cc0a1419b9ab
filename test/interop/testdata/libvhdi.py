"""Writes the content of a chain of VHD images to a file, as libvhdi reads it.

Arguments: the file, then the images, the uppermost first.
"""
import sys

import pyvhdi

CHUNK = 1 << 20

images = []
for path in sys.argv[2:]:
    image = pyvhdi.file()
    image.open(path)
    images.append(image)
for child, parent in zip(images, images[1:]):
    child.set_parent(parent)
size = images[0].get_media_size()
with open(sys.argv[1], "wb") as out:
    for offset in range(0, size, CHUNK):
        out.write(images[0].read_buffer_at_offset(min(CHUNK, size - offset), offset))
print("peer: libvhdi", pyvhdi.get_version())
