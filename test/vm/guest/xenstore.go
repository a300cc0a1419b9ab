package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

const xenstoreSocket = "/run/xenstored/socket"

// The types of xenstore's messages that are needed.
const (
	xsRead   = 2
	xsWrite  = 11
	xsRemove = 13
	xsError  = 16
)

// errNoEntry is xenstored's answer about a path that does not exist.
var errNoEntry = errors.New("no such entry in xenstore")

// xenstore is a connection to xenstored. Its methods may be called concurrently.
type xenstore struct {
	mu   sync.Mutex
	conn net.Conn
	last uint32 // id of the last request
}

func openXenstore() (*xenstore, error) {
	conn, err := net.Dial("unix", xenstoreSocket)
	if err != nil {
		return nil, fmt.Errorf("connecting to xenstored: %w", err)
	}
	return &xenstore{conn: conn}, nil
}

func (x *xenstore) close() error { return x.conn.Close() }

// xsHeader precedes each message, in the byte order of the machine.
type xsHeader struct{ Type, Request, Transaction, Length uint32 }

// ask sends one request, outside of any transaction, and returns the answer.
func (x *xenstore) ask(typ uint32, path, rest string) (string, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.last++
	payload := path + "\x00" + rest
	message, err := binary.Append(nil, binary.NativeEndian, xsHeader{typ, x.last, 0, uint32(len(payload))})
	if err == nil {
		_, err = x.conn.Write(append(message, payload...))
	}
	var header xsHeader
	if err == nil {
		err = binary.Read(x.conn, binary.NativeEndian, &header)
	}
	if err != nil {
		return "", fmt.Errorf("xenstore, %s: %w", path, err)
	}
	answer := make([]byte, header.Length)
	if _, err := io.ReadFull(x.conn, answer); err != nil {
		return "", fmt.Errorf("xenstore, %s: %w", path, err)
	}
	text := strings.TrimSuffix(string(answer), "\x00")
	switch {
	case header.Request != x.last:
		return "", fmt.Errorf("xenstore, %s: got the answer to request %d, want that to %d", path, header.Request, x.last)
	case header.Type == xsError && text == "ENOENT":
		return "", fmt.Errorf("%s: %w", path, errNoEntry)
	case header.Type == xsError:
		return "", fmt.Errorf("xenstore, %s: %s", path, text)
	}
	return text, nil
}

func (x *xenstore) read(path string) (string, error) { return x.ask(xsRead, path, "") }

func (x *xenstore) write(path, value string) error {
	_, err := x.ask(xsWrite, path, value)
	return err
}

// entry is a name below some path, and its value.
type entry struct{ name, value string }

// writeAll writes entries below a path, in their order.
func (x *xenstore) writeAll(path string, entries ...entry) error {
	for _, e := range entries {
		if err := x.write(path+"/"+e.name, e.value); err != nil {
			return err
		}
	}
	return nil
}

// remove removes a path and all below it. It may be repeated.
func (x *xenstore) remove(path string) error {
	_, err := x.ask(xsRemove, path, "")
	if errors.Is(err, errNoEntry) {
		return nil
	}
	return err
}
