package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/nbd/client"
)

// side is one of the two arguments of copy: an export or a path.
type side struct {
	uri  *client.URI // or nil
	nbd  *target     // the same, with the settings of the flags
	path string
}

func (s side) overTLS() bool { return s.uri != nil && s.uri.TLS }

// sides parses SRC and DST.
func (o *copyOptions) sides(args []string, in *secretInput) (src, dst side, err error) {
	if o.src.named() {
		src.uri, err = o.src.uri("", in)
	} else {
		src, err = parseSide(args[0], in)
		args = args[1:]
	}
	if err != nil {
		return src, dst, err
	}
	if o.dstFile != "" {
		dst, err = readSide(o.dstFile, in)
	} else {
		dst, err = parseSide(args[0], in)
	}
	if err != nil {
		return src, dst, err
	}
	if o.changedSince != "" && src.uri == nil {
		return src, dst, usagef("--changed-since needs an export as SRC: the changed blocks of a file are not known")
	}
	if src.path == "-" {
		return src, dst, usagef("SRC cannot be standard input: its size is not known")
	}
	if o.src.connect.aboutTLS() && !src.overTLS() && !dst.overTLS() {
		return src, dst, errNeedsTLS
	}
	return src, dst, errors.Join(o.src.connect.addTo(&src), o.src.connect.addTo(&dst))
}

func parseSide(text string, in *secretInput) (side, error) {
	if !looksLikeURI(text) {
		return side{path: text}, nil
	}
	u, err := in.parseURI(text)
	return side{uri: u}, err
}

func readSide(file string, in *secretInput) (side, error) {
	text, err := in.readLine(file, "URI")
	if err != nil {
		return side{}, err
	}
	u, err := in.parseURI(text)
	return side{uri: u}, err
}

// addTo adds the settings of the flags to a side. Those for TLS apply to sides with TLS.
func (f *connectFlags) addTo(s *side) (err error) {
	if s.uri == nil {
		return nil
	}
	if !s.uri.TLS {
		f = f.withoutTLS()
	}
	s.nbd, err = f.target(s.uri)
	return err
}

// looksLikeURI reports whether an argument is a URI. For a file with such a name the user
// writes ./nbd:….
func looksLikeURI(s string) bool {
	scheme, _, found := strings.Cut(s, ":")
	scheme = strings.ToLower(scheme)
	return found && (strings.Contains(s, "://") && !strings.Contains(scheme, "/") ||
		scheme == "nbd" || scheme == "nbds" || scheme == "nbd+unix" || scheme == "nbds+unix")
}

// vdiSyntax matches the export names of XenServer and XCP-ng hosts.
var vdiSyntax = regexp.MustCompile(`^/([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\?`)

// vdiOf returns the UUID of the VDI that an export name names, or "".
func vdiOf(export string) string {
	if found := vdiSyntax.FindStringSubmatch(export); found != nil {
		return strings.ToLower(found[1])
	}
	return ""
}

// lookupTimeout bounds the comparison of two host names.
const lookupTimeout = 5 * time.Second

// sameSide returns a usage error if both sides are the same disk, as far as that can be seen.
// ends names the two in the message.
func sameSide(ctx context.Context, a, b side, ends string) error {
	switch {
	case a.uri != nil && b.uri != nil && sameExport(ctx, a.uri, b.uri):
		return usagef("%s: the same export is both %s", b.uri.Server(), ends)
	case a.uri != nil || b.uri != nil:
		return nil
	}
	same, err := sameFile(b.path, a.path)
	if err == nil && same {
		return usagef("%s is both %s", b.path, ends)
	}
	return err
}

// checkOwnFile returns a usage error if the file of a flag, or one of those beside it, is one of
// the sides.
func checkOwnFile(flag, file string, sides ...side) error {
	if file == "" {
		return nil
	}
	for _, s := range sides {
		for _, path := range []string{file, copying.TemporaryState(file), copying.LockFile(file)} {
			if s.uri != nil {
				continue
			}
			same, err := sameFile(s.path, path)
			if errors.Is(err, fs.ErrNotExist) {
				same, err = false, nil
			}
			if err != nil {
				return err
			}
			if same || samePath(s.path, path) {
				return usagef("%s needs a file of its own: %s is read or written itself", flag, s.path)
			}
		}
	}
	return nil
}

// samePath reports whether two paths name the same file, which need not exist.
func samePath(a, b string) bool {
	absA, errA := filepath.Abs(a)
	absB, errB := filepath.Abs(b)
	return errA == nil && errB == nil && absA == absB
}

// sameExport reports whether two URIs lead to the same VDI, or to the same export of the same
// server.
func sameExport(ctx context.Context, a, b *client.URI) bool {
	if vdi := vdiOf(a.Export); vdi != "" || vdiOf(b.Export) != "" {
		return vdi == vdiOf(b.Export) // in any pool, by any host
	}
	if a.Export != b.Export || a.Network != b.Network {
		return false
	}
	if a.Addr == b.Addr {
		return true
	}
	if a.Network == "unix" {
		one, err1 := os.Stat(a.Addr)
		other, err2 := os.Stat(b.Addr)
		return err1 == nil && err2 == nil && os.SameFile(one, other)
	}
	hostA, portA, _ := net.SplitHostPort(a.Addr)
	hostB, portB, _ := net.SplitHostPort(b.Addr)
	if portA != portB {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	addrsA, _ := net.DefaultResolver.LookupHost(ctx, hostA) // a host that is not found cannot be connected to
	addrsB, _ := net.DefaultResolver.LookupHost(ctx, hostB)
	return slices.ContainsFunc(addrsA, func(addr string) bool { return slices.Contains(addrsB, addr) })
}
