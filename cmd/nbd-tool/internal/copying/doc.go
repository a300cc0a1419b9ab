// Package copying copies between two ends, each of which is an export, a file or a block
// device ([End]), and compares them.
//
// A [Copier] makes a plan from the extents of the source, or from the blocks that have
// changed ([Changes]), and carries it out with many requests in flight. Where the source
// reads as zeroes, the destination is zeroed unless it reads as zeroes there already.
//
// Nothing counts as copied before the destination has flushed it. The plan is cut into
// segments; each is flushed when all of it has been written. If a connection to the
// destination was lost meanwhile, the server may have lost the writes with it, so the
// segment is copied again. The end of the last flushed segment can be recorded in a file
// ([State]), from which a later process goes on.
package copying
