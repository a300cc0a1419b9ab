package main

import (
	"encoding/binary"
	"io"
	"net"
	"testing"

	"xapi-nbd/nbd/wire"
)

// statusless is a conversation of a server that grants base:allocation, and answers
// NBD_CMD_BLOCK_STATUS without a status.
func statusless(nc net.Conn, content []byte) error {
	if _, err := nc.Write(wire.AppendGreeting(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(nc, flags[:]); err != nil {
		return err
	}
	info := wire.ExportInfo{Size: uint64(len(content)), Flags: wire.FlagHasFlags | wire.FlagReadOnly}
	base := wire.MetaContext{ID: 1, Name: wire.BaseAllocation}
	for opt := wire.Option(0); opt != wire.OptGo; {
		var err error
		if opt, err = receiveOption(nc); err != nil {
			return err
		}
		var reply []byte
		end := wire.RepAck
		switch opt {
		case wire.OptExtendedHeaders:
			end = wire.RepErrUnsup
		case wire.OptSetMetaContext:
			reply = wire.AppendOptionReply(nil, opt, wire.RepMetaContext, base.Append(nil))
		case wire.OptGo:
			reply = wire.AppendOptionReply(nil, opt, wire.RepInfo, info.AppendInfo(nil, wire.InfoExport))
		}
		if _, err := nc.Write(wire.AppendOptionReply(reply, opt, end, nil)); err != nil {
			return err
		}
	}
	for {
		r, err := receiveRequest(nc)
		if err != nil {
			return err
		}
		var payload []byte
		chunk := wire.Chunk{Flags: wire.ChunkFlagDone, Type: wire.ChunkNone, Cookie: r.Cookie}
		if r.Command == wire.CmdRead {
			chunk.Type = wire.ChunkOffsetData
			payload = append(binary.BigEndian.AppendUint64(nil, r.Offset), content[r.Offset:r.Offset+r.Length]...)
		}
		chunk.Length = uint64(len(payload))
		var b [wire.ChunkLen]byte
		wire.PutChunk(&b, chunk)
		if _, err := nc.Write(append(b[:], payload...)); err != nil {
			return err
		}
	}
}

// Ranges are read if the server has no extents for them, or invalid ones.
func TestCopyReadsWhatExtentsDoNotTell(t *testing.T) {
	want := content(1 << 20)
	uri := scriptedServer(t, func(nc net.Conn) error { return statusless(nc, want) })
	fail(t, exitFailed, []string{"left out the status"}, "map", uri) // the premise
	if got := succeed(t, "copy", uri, "-"); got != string(want) {
		t.Error("wrong data")
	}
}
