package main

import (
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

// plainServer plays tapdisk's server: it offers READ, WRITE and DISC and nothing else, and gives
// no flags. It notices requests that tapdisk cannot serve.
type plainServer struct {
	uri      string
	inFlight atomic.Int64
	misused  atomic.Bool

	mu   sync.Mutex // guards data, and the replies
	data []byte
}

// startPlainServer serves until the end of the test.
func startPlainServer(t *testing.T, content []byte) *plainServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &plainServer{uri: "nbd://" + l.Addr().String() + "/", data: slices.Clone(content)}
	var active sync.WaitGroup
	active.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			active.Go(func() {
				defer c.Close()
				if s.negotiate(c) == nil {
					s.transmit(c)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		active.Wait()
	})
	return s
}

func (s *plainServer) content() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.data)
}

// The numbers of the protocol that are needed here.
const (
	plainOptMagic   = 0x49484156454F5054
	plainReplyMagic = 0x3e889045565a9
	plainUnsupport  = 1<<31 + 1
	plainHasFlags   = 1
)

func (s *plainServer) negotiate(c net.Conn) error {
	hello := append([]byte("NBDMAGICIHAVEOPT"), 0, 3) // fixed newstyle, no zeroes
	if _, err := c.Write(hello); err != nil {
		return err
	}
	head := make([]byte, 16)
	if _, err := io.ReadFull(c, head[:4]); err != nil { // the client's flags
		return err
	}
	for {
		if _, err := io.ReadFull(c, head); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(head) != plainOptMagic {
			return io.ErrUnexpectedEOF
		}
		option, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if _, err := io.CopyN(io.Discard, c, int64(n)); err != nil {
			return err
		}
		reply := func(kind uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, plainReplyMagic)
			b = binary.BigEndian.AppendUint32(b, option)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := c.Write(append(b, data...))
			return err
		}
		if option != 7 { // NBD_OPT_GO
			if err := reply(plainUnsupport, nil); err != nil {
				return err
			}
			continue
		}
		info := binary.BigEndian.AppendUint16(nil, 0) // NBD_INFO_EXPORT
		info = binary.BigEndian.AppendUint64(info, uint64(len(s.data)))
		info = binary.BigEndian.AppendUint16(info, plainHasFlags)
		if err := reply(3, info); err != nil {
			return err
		}
		return reply(1, nil) // NBD_REP_ACK
	}
}

// transmit serves requests, each in a goroutine of its own.
func (s *plainServer) transmit(c net.Conn) {
	var active sync.WaitGroup
	defer active.Wait()
	for {
		head := make([]byte, 28)
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		flags, command := binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:])
		off, n := int64(binary.BigEndian.Uint64(head[16:])), int64(binary.BigEndian.Uint32(head[24:]))
		if command == 2 { // NBD_CMD_DISC
			return
		}
		p := make([]byte, n)
		if command == 1 {
			if _, err := io.ReadFull(c, p); err != nil {
				return
			}
		}
		now := s.inFlight.Add(1)
		if now > tapdiskInFlight || off%512 != 0 || n%512 != 0 || flags != 0 || command > 1 {
			s.misused.Store(true)
		}
		active.Go(func() {
			b := binary.BigEndian.AppendUint32(nil, 0x67446698)
			b = append(append(b, 0, 0, 0, 0), head[8:16]...)
			s.mu.Lock()
			defer s.mu.Unlock()
			s.inFlight.Add(-1)
			if command == 1 {
				copy(s.data[off:], p)
			} else {
				b = append(b, s.data[off:off+n]...)
			}
			_, _ = c.Write(b) // the client has gone
		})
	}
}

// tapdiskInFlight is the number of requests that tapdisk serves at a time.
const tapdiskInFlight = 8
