package nbd

import "xapi-nbd/nbd/wire"

// command defines how one kind of request is checked and served. Either do or answer is set,
// except for READ, see beginRead. They are called concurrently.
type command struct {
	// flags are the flags that are allowed, besides FUA, which is allowed on every
	// command if it was advertised.
	flags wire.CommandFlags
	// writes means that it is refused with EPERM on a read-only export.
	writes bool
	// ranged means that offset and length are a range of the export.
	ranged bool
	// past is the error for a range that ends after the end of the export.
	past wire.Errno
	// moves means that the payload of the request or of its reply has the length of the
	// request, so the maximum payload limits it and the budget counts it.
	moves bool
	// offered reports whether the export supports it; otherwise it gets EINVAL.
	offered func(*session) bool
	// do serves a request whose reply has no data. payload is that of the request.
	do func(t *transmission, req wire.Request, payload []byte) error
	// answer serves a request and sends the reply.
	answer func(t *transmission, req wire.Request, payload []byte)
}

// commands has all commands that are served, except NBD_CMD_DISC, see disconnects.
var commands map[wire.Command]*command

func init() { // a composite literal would be an initialization cycle
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
