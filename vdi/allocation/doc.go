// Package allocation finds out which blocks of a VDI have data, by reading the metadata
// of its VHD images beside the storage manager (SM) that owns them.
//
// A hole must be certain. So [Read] returns a set of blocks only if every image of the
// chain was found, is supported, and did not change from the beginning to the end.
// Otherwise it returns an error that matches [ErrUnknown], and every block may have data.
// The caller must make sure that the content of the VDI is frozen: the allocation of a
// disk that is being written is out of date at once.
//
// # Why the result is right although images change meanwhile
//
// SM's garbage collector merges images while they are in use. It copies the blocks of
// an image X into its parent P, then gives the images above X the parent P, then
// deletes X. In an image that exists, a used entry of the block allocation table never
// becomes unused again, and an image gets a new parent only when that parent has all
// the blocks. So the union of the tables of a chain, read in any order and at any
// moments, has every block with data, as long as it is the union of one complete
// chain. Two steps make sure of that:
//
//   - All images are opened, from the top to the last parent, before the first table is
//     read, and stay open until the last one was read. An image that is deleted
//     meanwhile can still be read.
//   - Afterwards each path is opened again and must lead to the same file or device
//     with the same metadata. If it does not, everything begins anew.
//
// The sector bitmaps inside blocks do not have that property, and reading them takes
// hours for a large disk, so the unit is a whole block.
//
// The package opens images for reading only and without the page cache of this host,
// which may be older than the image on a shared file system. It takes no lock, runs no
// program and does not talk to tapdisk.
package allocation
