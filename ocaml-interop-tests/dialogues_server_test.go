package interop

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// likeTheOriginal sets the original's TLS policy: TLS 1.2 and one curve.
func likeTheOriginal(c *tls.Config) *tls.Config {
	c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	c.CurvePreferences = []tls.CurveID{tls.CurveP384}
	return c
}

// serverDialogues are the bytes of servers of the original, played to our client.
var serverDialogues = []struct {
	file string
	run  func(ctx context.Context, nc net.Conn) error // nil: pull
}{
	{file: "server_pull"},
	{file: "server_writable", run: writeAndReadBack},
	{file: "server_list", run: func(ctx context.Context, nc net.Conn) error {
		list, err := listOf(ctx, nc)
		if err == nil && !slices.Equal(list, []client.Export{{Name: "export1"}, {Name: "export2"}}) {
			err = fmt.Errorf("got %v, want export1 and export2", list)
		}
		return err
	}},
	{file: "server_list_refused", run: func(ctx context.Context, nc net.Conn) error {
		_, err := listOf(ctx, nc)
		return wantReply(wire.RepErrPolicy, err)
	}},
	{file: "server_tls_refused", run: func(ctx context.Context, nc net.Conn) error {
		defer nc.Close()
		_, err := client.New(ctx, nc, &client.Config{TLSConfig: &tls.Config{ServerName: "any"}})
		return wantReply(wire.RepErrPolicy, err)
	}},
	{file: "server_tls_required", run: func(ctx context.Context, nc net.Conn) error {
		c, err := client.New(ctx, nc, nil)
		if err != nil {
			return err
		}
		_, err = c.Go(ctx, export)
		return errors.Join(wantReply(wire.RepErrTLSReqd, err), c.Abort())
	}},
	{file: "server_unknown_export", run: func(ctx context.Context, nc net.Conn) error {
		_, err := open(ctx, nc, nil)
		if !errors.Is(err, io.EOF) {
			return fmt.Errorf("got error %w, want the end of the connection", err)
		}
		return nil
	}},
	{file: "server_read_fails", run: readFails},
	{file: "server_misaligned", run: readIsMisaligned},
}

func wantReply(want wire.OptionReply, err error) error {
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Reply != want {
		return fmt.Errorf("got error %w, want %v", err, want)
	}
	return nil
}

func open(ctx context.Context, nc net.Conn, cfg *client.Config) (*client.Conn, error) {
	c, err := client.New(ctx, nc, cfg)
	if err != nil {
		nc.Close()
		return nil, err
	}
	conn, err := c.Go(ctx, export)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}

func listOf(ctx context.Context, nc net.Conn) ([]client.Export, error) {
	c, err := client.New(ctx, nc, nil)
	if err != nil {
		nc.Close()
		return nil, err
	}
	list, err := c.List(ctx)
	return list, errors.Join(err, c.Abort())
}

// pull reads the second sector of the disk and disconnects.
func pull(ctx context.Context, nc net.Conn, cfg *client.Config) error {
	conn, err := open(ctx, nc, cfg)
	if err != nil {
		return err
	}
	p := make([]byte, 512)
	err = conn.Read(ctx, p, 512)
	if err == nil && !bytes.Equal(p, rows()[512:1024]) {
		err = fmt.Errorf("got the bytes %q", p)
	}
	if err == nil && (conn.Size() != rowsSize || conn.Info().Flags != wire.FlagHasFlags|wire.FlagReadOnly) {
		err = fmt.Errorf("got an export of %d bytes with the flags %v", conn.Size(), conn.Info().Flags)
	}
	return errors.Join(err, conn.Close())
}

func writeAndReadBack(ctx context.Context, nc net.Conn) error {
	conn, err := open(ctx, nc, nil)
	if err != nil {
		return err
	}
	const text = "written to here\n"
	p := make([]byte, len(text))
	err = conn.Write(ctx, []byte(text), 512, false)
	if err == nil {
		err = conn.Read(ctx, p, 512)
	}
	if err == nil && string(p) != text {
		err = fmt.Errorf("got the bytes %q", p)
	}
	return errors.Join(err, conn.Close())
}

// readFails: after a success header not all bytes arrive.
func readFails(ctx context.Context, nc net.Conn) error {
	conn, err := open(ctx, nc, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.Read(ctx, make([]byte, 512), 512); !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("got error %w, want that the reply was cut short", err)
	}
	return nil
}

// readIsMisaligned: the errno arrives although the server disconnects after it, and later
// requests fail.
func readIsMisaligned(ctx context.Context, nc net.Conn) error {
	conn, err := open(ctx, nc, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.Read(ctx, make([]byte, 16), 16); !errors.Is(err, wire.EINVAL) {
		return fmt.Errorf("got error %w, want NBD_EINVAL", err)
	}
	<-conn.Done()
	if err := conn.Read(ctx, make([]byte, 512), 0); err == nil || errors.Is(err, wire.EINVAL) {
		return fmt.Errorf("got error %w from a server that has left", err)
	}
	return nil
}

func TestDialoguesOfServers(t *testing.T) {
	t.Run("original as dialogue", func(t *testing.T) {
		t.Run("its server", func(t *testing.T) {
			for _, tt := range serverDialogues {
				t.Run(strings.TrimPrefix(tt.file, "server_"), func(t *testing.T) {
					t.Log(dialoguesOf)
					near, far := net.Pipe()
					wait := nbdtest.PlayServer(t, far, load(t, tt.file))
					run := tt.run
					if run == nil {
						run = func(ctx context.Context, nc net.Conn) error { return pull(ctx, nc, nil) }
					}
					if err := run(t.Context(), near); err != nil {
						t.Error(err)
					}
					wait()
				})
			}
			t.Run("tls", dialogueOfTLSServer)
		})
	})
}

// keepOpen is a connection that stays open after the first part of a dialogue.
type keepOpen struct{ net.Conn }

func (keepOpen) Close() error { return nil }

func dialogueOfTLSServer(t *testing.T) {
	t.Log(dialoguesOf)
	serverTLS, clientTLS := nbdtest.TLS(t)
	near, far := net.Pipe()
	pulled := make(chan error, 1)
	go func() { pulled <- pull(t.Context(), near, &client.Config{TLSConfig: clientTLS}) }()
	nbdtest.PlayServer(t, keepOpen{far}, load(t, "server_tls_upgrade"))()
	secure := tls.Server(far, likeTheOriginal(serverTLS))
	if err := secure.HandshakeContext(t.Context()); err != nil {
		t.Error(err)
		far.Close()
	} else {
		nbdtest.PlayServer(t, secure, load(t, "server_tls_inside"))()
	}
	if err := <-pulled; err != nil {
		t.Error(err)
	}
}
