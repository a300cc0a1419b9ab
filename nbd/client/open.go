package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"xapi-nbd/nbd/wire"
)

var errHandedOver = errors.New("nbd: the connection belongs to a Conn now")

// Info describes an export without opening it, section "NBD_OPT_INFO". Servers that do not
// know the option refuse it: the error then matches [errors.ErrUnsupported].
func (c *Client) Info(ctx context.Context, name string) (*wire.ExportInfo, error) {
	var info *wire.ExportInfo
	err := c.exchange(ctx, func() (err error) {
		info, err = c.optInfo(wire.OptInfo, name, wire.InfoName, wire.InfoDescription, wire.InfoBlockSize)
		return err
	})
	if err != nil {
		return nil, err
	}
	return info, nil
}

// Go opens an export and starts the transmission phase, sections "NBD_OPT_GO" and
// "NBD_OPT_SET_META_CONTEXT". The empty name is the server's default export. If the server
// refuses, the error is an [*Error] and the Client can be used further. A server that does
// not know NBD_OPT_GO is asked with NBD_OPT_EXPORT_NAME, which it can refuse only by
// closing the connection.
//
// ctx limits Go, not the Conn. The caller must close the Conn, which ends the connection;
// the Client cannot be used any more.
func (c *Client) Go(ctx context.Context, name string) (*Conn, error) {
	var conn *Conn
	err := c.exchange(ctx, func() error {
		contexts, err := c.setMetaContexts(name)
		if err != nil {
			return err
		}
		info, err := c.open(name)
		if err != nil {
			return err
		}
		conn = newConnOf(c.nc, *info, c.cfg.ProgressTimeout)
		conn.mode, conn.contexts = c.mode, contexts
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.ended = errHandedOver
	go conn.receive() // returns when the connection ends; Close waits for that
	return conn, nil
}

// open opens the export with NBD_OPT_GO, or with NBD_OPT_EXPORT_NAME if the server does
// not know that.
func (c *Client) open(name string) (info *wire.ExportInfo, err error) {
	if c.fixed {
		info, err = c.optInfo(wire.OptGo, name, wire.InfoBlockSize, wire.InfoDescription)
	}
	if !c.fixed || isReply(err, wire.RepErrUnsup) {
		info, err = c.optExportName(name)
	}
	switch {
	case err != nil:
		return nil, err
	case info.Flags&wire.FlagHasFlags == 0:
		return nil, errors.New("server sent transmission flags without NBD_FLAG_HAS_FLAGS")
	case info.Size > math.MaxInt64:
		return nil, fmt.Errorf("server sent an impossible size, %d bytes", info.Size)
	}
	return info, nil
}

// optInfo sends INFO or GO and collects the information until the ACK, section
// "NBD_OPT_INFO and NBD_OPT_GO".
func (c *Client) optInfo(opt wire.Option, name string, infos ...wire.Info) (*wire.ExportInfo, error) {
	if !c.fixed {
		return nil, errNotFixed(opt)
	}
	if err := checkString("export name", name); err != nil {
		return nil, err
	}
	var info wire.ExportInfo
	known := false
	req := wire.InfoRequest{Name: name, Infos: infos}
	err := c.ask(opt, req.Append(nil), maxReplies, func(typ wire.OptionReply, data []byte) error {
		if typ != wire.RepInfo {
			return replyError(opt, typ, data)
		}
		kind, err := info.ParseInfo(data)
		if err != nil {
			return fmt.Errorf("%v: %w", opt, err)
		}
		known = known || kind == wire.InfoExport
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case !known:
		return nil, fmt.Errorf("%v: server acknowledged without NBD_INFO_EXPORT", opt)
	}
	return &info, nil
}

// optExportName opens an export as servers without NBD_OPT_GO require it, section
// "NBD_OPT_EXPORT_NAME".
func (c *Client) optExportName(name string) (*wire.ExportInfo, error) {
	if err := checkString("export name", name); err != nil {
		return nil, err
	}
	if _, err := c.nc.Write(wire.AppendOption(nil, wire.OptExportName, []byte(name))); err != nil {
		return nil, fmt.Errorf("%v: %w", wire.OptExportName, connError{err})
	}
	var b [wire.ExportNameReplyLen]byte
	if _, err := io.ReadFull(c.nc, b[:]); err != nil {
		return nil, fmt.Errorf("%v: no answer, which is how the server refuses an export: %w", wire.OptExportName, connError{err})
	}
	if c.flags&wire.FlagCNoZeroes == 0 {
		var zeroes [wire.ExportNameZeroes]byte
		if _, err := io.ReadFull(c.nc, zeroes[:]); err != nil {
			return nil, fmt.Errorf("%v: answer cut short: %w", wire.OptExportName, connError{err})
		}
	}
	var info wire.ExportInfo
	info.Size, info.Flags = wire.ParseExportNameReply(&b)
	return &info, nil
}
