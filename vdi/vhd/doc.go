// Package vhd reads the metadata of VHD images: how large the disk is, which image is
// the parent, and which blocks the image has. It reads no content and writes nothing.
//
// The format is that of Microsoft's "Virtual Hard Disk Image Format Specification"
// with blktap's additions: the hidden flag, the parent locator MacX, and a block
// allocation table (BAT) that may reserve more entries than the disk has blocks.
// Dynamic and differencing images are supported. A fixed image has no metadata at its
// beginning and is not recognized.
//
// Images come from storage that others write to, so no length in an image decides how
// much memory is allocated, and everything that a caller relies on is checked. The
// package knows nothing of chains of images: see package vdi/allocation.
package vhd
