// Package wire is the vocabulary of the NBD protocol: its numbers, their
// names, and the layout of its messages. It does no I/O, starts no goroutine
// and holds no policy; every function is safe for concurrent use.
//
// The authority is the protocol text of the NBD project (doc/proto.md).
// Sections of it are cited by title. Names follow the text without the NBD_
// prefix and without shouting: NBD_OPT_EXPORT_NAME is [OptExportName],
// NBD_REP_ERR_UNSUP is [RepErrUnsup], NBD_EINVAL is [EINVAL].
//
// All integers on the wire are big-endian. Fixed layouts have an Append or Put
// function and a Parse function over byte slices or arrays; layouts with
// variable parts are read with a cursor whose first error sticks.
package wire
