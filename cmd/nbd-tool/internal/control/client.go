package control

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
)

// maxReply bounds a reply.
const maxReply = 64 << 10

// Call sends a request to the socket at path, and returns the reply. An error means that there
// is none; a reply with OK false is returned without an error. When ctx ends, the connection
// is closed.
func Call(ctx context.Context, path string, r Request) (*Reply, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	line, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(append(line, '\n')); err != nil {
		return nil, callError(ctx, path, err)
	}
	in := bufio.NewScanner(c)
	in.Buffer(nil, maxReply)
	if !in.Scan() {
		err := in.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return nil, callError(ctx, path, err)
	}
	reply := new(Reply)
	if err := json.Unmarshal(in.Bytes(), reply); err != nil {
		return nil, fmt.Errorf("%s: not the reply of a mirror: %w", path, err)
	}
	return reply, nil
}

// callError returns why a connection ended without a reply.
func callError(ctx context.Context, path string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return fmt.Errorf("%s: the mirror closed the connection without a reply: %w", path, err)
}
