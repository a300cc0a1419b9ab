package main

import (
	"context"
	"io"
	"net"
	"time"

	"xapi-nbd/nbd/wire"
)

// greetByHand connects and answers the greeting, for requests that package client cannot
// send. It returns nil if the connection was refused.
func (c *stressClient) greetByHand() *net.TCPConn {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	nc := c.dial(ctx)
	if nc == nil {
		return nil
	}
	_ = nc.SetDeadline(time.Now().Add(patience)) // cannot fail while it is open
	_, err := io.ReadFull(nc, make([]byte, wire.GreetingLen))
	if err == nil {
		_, err = nc.Write(wire.AppendClientFlags(nil, wire.FlagCFixedNewstyle|wire.FlagCNoZeroes))
	}
	if err != nil {
		c.refused("greeting", err)
		nc.Close()
		return nil
	}
	return nc.(*net.TCPConn)
}

// leaveHaggling is a client that disconnects before it has an export.
func (c *stressClient) leaveHaggling(d *stressDisk) {
	nc := c.greetByHand()
	if nc == nil {
		return
	}
	defer nc.Close()
	c.s.count.inHaggling.Add(1)
	info := wire.InfoRequest{Name: c.exportName(d)}
	var say []byte
	hear := false
	switch c.rng.IntN(5) {
	case 0:
		say, hear = wire.AppendOption(nil, wire.OptAbort, nil), true
	case 1: // half an option
		say = wire.AppendOption(nil, wire.OptInfo, info.Append(nil))
		say = say[:c.rng.IntN(len(say))]
	case 2: // no handshake behind it
		say, hear = wire.AppendOption(nil, wire.OptStartTLS, nil), true
	default: // opens the export, and does not take it
		say, hear = wire.AppendOption(nil, wire.OptInfo, info.Append(nil)), true
	}
	if _, err := nc.Write(say); err != nil {
		return // the service may have made room for others
	}
	if hear {
		_, err := nc.Read(make([]byte, 1<<10))
		c.checkStuck("an answer", err)
	}
}

// hangUp sends GO and disconnects without waiting for the reply.
func (c *stressClient) hangUp(ctx context.Context, d *stressDisk) {
	nc := c.greetByHand()
	if nc == nil {
		return
	}
	defer nc.Close()
	c.s.count.duringTheAsk.Add(1)
	name := c.exportName(d)
	request := wire.InfoRequest{Name: name}
	ask := wire.AppendOption(nil, wire.OptGo, request.Append(nil))
	if c.rng.IntN(2) == 0 {
		ask = wire.AppendOption(nil, wire.OptExportName, []byte(name))
	}
	_, _ = nc.Write(ask) // the service may have made room for others
	stressPause(ctx, c.upTo(10*time.Millisecond))
}

// oldWay is a client that sends EXPORT_NAME and its requests at once, and disconnects before
// it has all replies, or with NBD_CMD_DISC.
func (c *stressClient) oldWay(d *stressDisk) (served bool) {
	nc := c.greetByHand()
	if nc == nil {
		return false
	}
	defer nc.Close()
	var answer [wire.ExportNameReplyLen]byte
	_, err := nc.Write(wire.AppendOption(nil, wire.OptExportName, []byte(c.exportName(d))))
	if err == nil {
		_, err = io.ReadFull(nc, answer[:])
	}
	if err != nil {
		c.refused("NBD_OPT_EXPORT_NAME", err)
		c.logOut() // the only reason that a client can mend
		return false
	}
	c.s.count.connections.Add(1)
	requests := make([]wire.Request, 1+c.rng.IntN(8))
	var out []byte
	for i := range requests {
		length := 512 * (1 + c.rng.IntN(stressMaxRead/512))
		offset := 512 * c.rng.IntN((stressDiskSize-length)/512+1)
		requests[i] = wire.Request{Command: wire.CmdRead, Cookie: uint64(i), Offset: uint64(offset), Length: uint64(length)}
		out = requests[i].Append(out)
	}
	if _, err := nc.Write(out); err != nil {
		c.checkStuck("a request", err)
		return true
	}
	taken := c.rng.IntN(len(requests) + 1)
	for range taken {
		if !c.takeReply(nc, d, requests) {
			return true
		}
	}
	if taken == len(requests) {
		c.s.count.softly.Add(1)
		_, _ = nc.Write(wire.Request{Command: wire.CmdDisc}.Append(nil)) // or the other end was quicker
		return true
	}
	c.s.count.abrupt.Add(1)
	if c.rng.IntN(2) == 0 {
		_ = nc.SetLinger(0) // so that it is closed with a reset
	}
	return true
}

// takeReply reads one simple reply and compares its data. It reports whether there may be
// more replies.
func (c *stressClient) takeReply(nc net.Conn, d *stressDisk, requests []wire.Request) bool {
	var header [wire.SimpleReplyLen]byte
	if _, err := io.ReadFull(nc, header[:]); err != nil {
		c.checkStuck("a reply", err)
		c.s.count.failed.Add(1)
		return false
	}
	reply, err := wire.ParseSimpleReply(&header)
	if err != nil || reply.Cookie >= uint64(len(requests)) {
		c.s.fail("not a reply: %x", header)
		return false
	}
	if reply.Errno != wire.Success {
		c.s.count.failed.Add(1)
		return true
	}
	r := requests[reply.Cookie]
	got := make([]byte, r.Length)
	if _, err := io.ReadFull(nc, got); err != nil {
		c.checkStuck("a reply", err)
		c.s.count.failed.Add(1)
		return false
	}
	c.s.compare(d, int(r.Offset), got)
	return true
}
