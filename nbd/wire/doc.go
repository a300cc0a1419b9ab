// Package wire is the vocabulary of the NBD protocol: its numbers, their
// names, and the layout of its messages. It does no I/O, starts no goroutine
// and holds no policy; every function is safe for concurrent use.
//
// It follows the specification of the NBD project (doc/proto.md). Doc comments cite its
// sections by their titles. Names are those of the specification without the prefix NBD_,
// in mixed caps: NBD_OPT_EXPORT_NAME is [OptExportName], NBD_REP_ERR_UNSUP is
// [RepErrUnsup], NBD_EINVAL is [EINVAL].
//
// All integers on the wire are big-endian. Fixed layouts have an Append or Put
// function and a Parse function over byte slices or arrays; layouts with
// variable parts are read with a cursor that keeps its first error.
package wire
