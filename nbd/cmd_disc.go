package nbd

import "xapi-nbd/nbd/wire"

// disconnects reports whether a request is NBD_CMD_DISC, section "Terminating the
// transmission phase". No further request is read then, those in flight are answered, and
// the connection is closed. It has no reply, so it is not validated.
func disconnects(req wire.Request) bool { return req.Command == wire.CmdDisc }
