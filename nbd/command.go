package nbd

import "xapi-nbd/nbd/wire"

// command is how one kind of request is checked and served. One of do and
// answer is set, except for READ, see beginRead; they run concurrently with
// others.
type command struct {
	// flags are allowed on it, besides FUA, which is allowed on every command if
	// it was advertised.
	flags wire.CommandFlags
	// writes: refused with EPERM on a read-only export.
	writes bool
	// ranged: offset and length are a range of the export.
	ranged bool
	// past is the error for a range that ends behind the export.
	past wire.Errno
	// moves: as many bytes as the request's length travel with the request or
	// with its answer, so the maximum payload is their limit and the budget
	// counts them.
	moves bool
	// offered says whether it works on the export; others get EINVAL.
	offered func(*session) bool
	// do serves a request whose answer has no data. payload came with it.
	do func(t *transmission, req wire.Request, payload []byte) error
	// answer serves a request and sends the answer.
	answer func(t *transmission, req wire.Request, payload []byte)
}

// commands are all that can be served; NBD_CMD_DISC is the reader's own.
var commands map[wire.Command]*command

func init() { // not a literal: its functions refer to it
	commands = map[wire.Command]*command{
		wire.CmdRead:        cmdRead,
		wire.CmdWrite:       cmdWrite,
		wire.CmdFlush:       cmdFlush,
		wire.CmdTrim:        cmdTrim,
		wire.CmdCache:       cmdCache,
		wire.CmdWriteZeroes: cmdWriteZeroes,
		wire.CmdBlockStatus: cmdBlockStatus,
	}
}

func always(*session) bool { return true }
