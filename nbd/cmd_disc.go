package nbd

import "xapi-nbd/nbd/wire"

// disconnects recognises DISC, section "Terminating the transmission phase": the
// reader of requests ends, those in flight are answered, and the connection
// closes. It has no reply, so nothing about it can be refused.
func disconnects(req wire.Request) bool { return req.Command == wire.CmdDisc }
