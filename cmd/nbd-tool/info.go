package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// infoReport is the output of info --json; its keys are stable.
type infoReport struct {
	Name        string         `json:"name"`
	Description string         `json:"description"`
	Size        uint64         `json:"size"`
	ReadOnly    bool           `json:"read_only"`
	Flags       []string       `json:"flags"`
	BlockSize   *blockSizes    `json:"block_size"` // null: not advertised
	Contexts    []string       `json:"contexts"`
	Protocol    protocolReport `json:"protocol"`
}

type blockSizes struct {
	Minimum        uint32 `json:"minimum"`
	Preferred      uint32 `json:"preferred"`
	MaximumPayload uint32 `json:"maximum_payload"`
}

type protocolReport struct {
	TLS               *tlsReport `json:"tls"` // null: in the clear
	StructuredReplies bool       `json:"structured_replies"`
	ExtendedHeaders   bool       `json:"extended_headers"`
}

type tlsReport struct {
	Version string `json:"version"`
	Cipher  string `json:"cipher"`
}

func newInfoCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info",
		Short: "Show the properties of an export",
		Long: `Show the properties of an export: size, description, transmission flags, block
sizes, metadata contexts, and the protocol features of the connection.

A metadata context with a colon at its end is a prefix: qemu:dirty-bitmap: is
followed by the name of a bitmap. "map" shows a context.

With --json the keys are: name (canonical, or the one asked for), description,
size, read_only, flags, block_size {minimum, preferred, maximum_payload} or null,
contexts, protocol {tls {version, cipher} or null, structured_replies,
extended_headers}. Sizes are in bytes.`,
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return uriCommand(cmd, false, func(cmd *cobra.Command, t *target) error {
		report, err := t.inform(cmd.Context())
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), report)
		}
		return report.print(cmd.OutOrStdout())
	})
}

func newSizeCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "size",
		Short: "Print the size of an export in bytes",
		Long: `Print the size of an export in bytes, and nothing else.

With --json: {"size": …}.`,
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return uriCommand(cmd, false, func(cmd *cobra.Command, t *target) error {
		c, err := t.dial(cmd.Context())
		if err != nil {
			return err
		}
		info, err := t.info(cmd.Context(), c)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), map[string]uint64{"size": info.Size})
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), info.Size)
		return err
	})
}

// info asks for the information about an export with NBD_OPT_INFO, or opens the export if
// the server does not support that. The client has ended when it returns.
func (t *target) info(ctx context.Context, c *client.Client) (*wire.ExportInfo, error) {
	ctx, cancel := within(ctx, openTimeout)
	defer cancel()
	info, err := c.Info(ctx, t.uri.Export)
	if !mayOpenInstead(err) {
		_ = c.Abort()
		if err != nil {
			return nil, t.explain(err)
		}
		return info, nil
	}
	conn, err := t.goOn(ctx, c)
	if err != nil {
		_ = c.Abort()
		return nil, err
	}
	opened := conn.Info()
	return &opened, conn.Close()
}

// mayOpenInstead reports whether a server does not support NBD_OPT_INFO, which the first
// versions of the protocol did not have.
func mayOpenInstead(err error) bool {
	var refused *client.Error
	return errors.Is(err, client.ErrUnsupported) || errors.As(err, &refused) && refused.Reply == wire.RepErrUnsup
}

// inform collects the report.
func (t *target) inform(ctx context.Context) (*infoReport, error) {
	c, err := t.dial(ctx)
	if err != nil {
		return nil, err
	}
	report := &infoReport{Flags: []string{}, Contexts: []string{}, Protocol: protocolReport{
		StructuredReplies: c.Structured(), ExtendedHeaders: c.Extended()}}
	if state := c.TLS(); state != nil {
		report.Protocol.TLS = &tlsReport{tls.VersionName(state.Version), tls.CipherSuiteName(state.CipherSuite)}
	}
	if c.Structured() {
		names, err := t.listContexts(ctx, c)
		if err != nil {
			return nil, err
		}
		report.Contexts = append(report.Contexts, names...)
	}
	info, err := t.info(ctx, c)
	if err != nil {
		return nil, err
	}
	report.fill(info)
	if report.Name == "" {
		report.Name = t.uri.Export
	}
	return report, nil
}

// listContexts asks for the metadata contexts. If the server refuses that, there are none;
// any other error has ended the client.
func (t *target) listContexts(ctx context.Context, c *client.Client) ([]string, error) {
	ctx, cancel := within(ctx, openTimeout)
	defer cancel()
	names, err := c.ListMetaContexts(ctx, t.uri.Export)
	var refused *client.Error
	if err == nil || errors.As(err, &refused) {
		return names, nil
	}
	return nil, t.explain(err)
}

func (r *infoReport) fill(info *wire.ExportInfo) {
	r.Name, r.Description, r.Size = info.Name, info.Description, info.Size
	r.ReadOnly = info.Flags&wire.FlagReadOnly != 0
	if info.Flags != 0 {
		r.Flags = strings.Split(info.Flags.String(), "|")
	}
	if b := info.BlockSizes; b != (wire.BlockSizes{}) {
		r.BlockSize = &blockSizes{b.Min, b.Preferred, b.MaxPayload}
	}
}

// print writes the report as text.
func (r *infoReport) print(w io.Writer) error {
	var b strings.Builder
	row := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "%-14s %s\n", key+":", fmt.Sprintf(format, args...))
	}
	row("name", "%s", nameOrQuotes(r.Name))
	if r.Description != "" {
		row("description", "%s", printable(r.Description))
	}
	row("size", "%s", quantity(int64(r.Size)))
	row("access", "%s", map[bool]string{true: "read-only", false: "read and write"}[r.ReadOnly])
	row("flags", "%s", strings.Join(r.Flags, " "))
	if s := r.BlockSize; s != nil {
		row("block size", "minimum %d, preferred %d, maximum payload %d", s.Minimum, s.Preferred, s.MaximumPayload)
	} else {
		row("block size", "not advertised")
	}
	contexts := "none"
	if len(r.Contexts) > 0 {
		contexts = printable(strings.Join(r.Contexts, " "))
	}
	row("contexts", "%s", contexts)
	row("protocol", "%s", r.Protocol)
	_, err := io.WriteString(w, b.String())
	return err
}

// String returns the protocol as text.
func (p protocolReport) String() string {
	replies := "simple replies"
	switch {
	case p.ExtendedHeaders:
		replies = "extended headers"
	case p.StructuredReplies:
		replies = "structured replies"
	}
	if p.TLS == nil {
		return "in the clear, " + replies
	}
	return p.TLS.Version + " (" + p.TLS.Cipher + "), " + replies
}
