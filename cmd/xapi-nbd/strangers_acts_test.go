//go:build !race

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/wire"
)

// strangers are hundreds of connections without a session.
type strangers struct {
	addr string // of the service
	vdi  string
	dead string // export name with a session that has ended
	acts []atomic.Int64
	wg   sync.WaitGroup
}

// run lets all of them go on until ctx ends.
func (s *strangers) run(ctx context.Context) {
	address := 0
	for kind, k := range strangerKinds {
		for range k.addresses {
			address++
			dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 7, byte(address))}}
			for range strangersPerAddress {
				s.wg.Go(func() { s.repeatAct(ctx, dialer, kind) })
			}
		}
	}
}

func (s *strangers) repeatAct(ctx context.Context, dialer *net.Dialer, kind int) {
	pause := time.NewTicker(strangerPause)
	defer pause.Stop()
	for {
		if nc, err := dialer.DialContext(ctx, "tcp", s.addr); err == nil {
			stop := context.AfterFunc(ctx, func() { nc.Close() })
			strangerKinds[kind].act(s, nc)
			stop()
			nc.Close()
			s.acts[kind].Add(1)
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return
		}
	}
}

// greet answers the greeting.
func greet(nc net.Conn) error {
	if _, err := io.ReadFull(nc, make([]byte, wire.GreetingLen)); err != nil {
		return err
	}
	_, err := nc.Write(wire.AppendClientFlags(nil, wire.FlagCFixedNewstyle|wire.FlagCNoZeroes))
	return err
}

// ask asks for an export and reads the refusal, several times in one connection.
func (s *strangers) ask(nc net.Conn, name func() string) {
	if greet(nc) != nil {
		return
	}
	for range 8 {
		request := wire.InfoRequest{Name: name()}
		if _, err := nc.Write(wire.AppendOption(nil, wire.OptGo, request.Append(nil))); err != nil {
			return
		}
		if _, err := nc.Read(make([]byte, 1<<10)); err != nil {
			return
		}
	}
}

func (s *strangers) guess(nc net.Conn) {
	s.ask(nc, func() string { return fmt.Sprintf("/%s?session_id=OpaqueRef:%x", s.vdi, rand.Uint64()) })
}

func (s *strangers) repeat(nc net.Conn) { s.ask(nc, func() string { return s.dead }) }

func (s *strangers) oldWay(nc net.Conn) {
	if greet(nc) == nil {
		_, _ = nc.Write(wire.AppendOption(nil, wire.OptExportName, []byte(s.dead)))
		_, _ = nc.Read(make([]byte, 1<<10)) // the end
	}
}

// sayNothing keeps the connection until the service ends it.
func (s *strangers) sayNothing(nc net.Conn) { _, _ = io.Copy(io.Discard, nc) }

func (s *strangers) sendGarbage(nc net.Conn) {
	garbage := make([]byte, 512)
	for i := range garbage {
		garbage[i] = byte(rand.Uint32())
	}
	_, _ = nc.Write(garbage)
	_, _ = io.Copy(io.Discard, nc)
}
