// Package changes computes the parts of a disk that a client has to copy to bring a copy of
// an older snapshot up to date. It joins the blocks that have changed since the snapshot
// with the blocks that have data, and returns the extents of two metadata contexts, whose
// names end with the uuid of the older VDI:
//
//   - "qemu:dirty-bitmap:<uuid>", defined by QEMU: [Dirty] is the only status bit.
//   - "x-xapi:unchanged:<uuid>": [Unchanged] and [ChangedToZero]. Its first bit has the
//     opposite meaning, because qemu-img takes a set bit of a dirty bitmap for a hole: with
//     this context "qemu-img convert -B" copies the changed blocks, with the other one it
//     copies all but those.
//
// A part that is in doubt counts as changed and as data. The caller must make sure that the
// content of the disk is frozen, so that the changed blocks and the data are of one moment.
package changes
