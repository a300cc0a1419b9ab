package client

import (
	"bytes"
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// A read whose context is done returns at once, however much of its reply has arrived. Its
// buffer is not written to any more, and the connection can be used further.
func TestConnGivesUpARead(t *testing.T) {
	const n = 100 << 10
	stages := map[string]func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}){
		"nothing has come": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			<-givenUp
			s.send(chunk(mode, r, done, wire.ChunkOffsetData, dataAt(0, n)))
		},
		"between chunks": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			s.send(chunk(mode, r, 0, wire.ChunkOffsetData, dataAt(0, 100)))
			<-givenUp
			s.send(chunk(mode, r, 0, wire.ChunkOffsetHole, holeAt(100, 100)))
			s.send(chunk(mode, r, done, wire.ChunkOffsetData, dataAt(200, n-200)))
		},
		"inside the data": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			b := chunk(mode, r, done, wire.ChunkOffsetData, dataAt(0, n))
			s.send(b[:n/2])
			<-givenUp
			s.send(b[n/2:])
		},
		"inside a header": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			b := chunk(mode, r, done, wire.ChunkOffsetData, dataAt(0, n))
			s.send(b[:22])
			<-givenUp
			s.send(b[22:])
		},
		"never": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) { <-givenUp },
	}
	connect := map[string]func(*testing.T, func(s *script)) net.Conn{
		"clear": func(t *testing.T, run func(s *script)) net.Conn { return against(t, run) },
		"TLS":   encrypted,
	}
	for name, stage := range stages {
		for how, connect := range connect {
			t.Run(name+", "+how, func(t *testing.T) {
				everyMode(t, func(t *testing.T, mode replyMode) {
					synctest.Test(t, func(t *testing.T) {
						givenUp := make(chan struct{})
						conn := connWith(t, connect(t, func(s *script) {
							s.exports(t, mode, mebibyte)
							stage(s, mode, s.requestIn(mode), givenUp)
							for {
								s.send(chunk(mode, s.requestIn(mode), done, wire.ChunkNone, nil))
							}
						}), "a", nil)
						ctx, cancel := context.WithCancelCause(t.Context())
						reason := errors.New("no patience")
						time.AfterFunc(time.Second, func() { cancel(reason) })
						p := make([]byte, n)
						if err := conn.Read(ctx, p, 0); !errors.Is(err, reason) {
							t.Errorf("got error %v, want the cause", err)
						}
						mine := bytes.Repeat([]byte{0xa5}, n)
						copy(p, mine)
						close(givenUp)
						if err := conn.Flush(t.Context()); err != nil {
							t.Errorf("the next call: %v", err)
						}
						if !bytes.Equal(p, mine) {
							t.Error("the buffer was written to after the return")
						}
						if err := conn.Close(); err != nil {
							t.Error(err)
						}
					})
				})
			})
		}
	}
}
