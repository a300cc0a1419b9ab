package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/cmd/internal/tomlfile"
	"xapi-nbd/nbd/wire"
)

// serveSettings are the settings of serve that SIGHUP reads again.
type serveSettings struct {
	listen   []string
	certfile string // "" without TLS
	cafile   string // "" if clients need no certificate
	exports  []export
}

// export is a file or block device, and the name under which it is served.
type export struct {
	name, path  string
	description string // for people
	writable    bool
	storage     storage // set by try
}

// storage identifies the file or device of an export, and the one behind a loop device.
type storage struct{ own, behind fileID }

// same reports whether writing to one changes the other. Two devices on the same file may be
// different parts of it.
func (s storage) same(other storage) bool {
	return s.own == other.own || s.behind == other.own || s.own == other.behind
}

// settingsSource is where the settings come from: the flags, or the file of --config.
type settingsSource struct {
	fixed *serveSettings // nil with --config
	file  string
}

// read returns the settings, after each of their files was opened once.
func (s settingsSource) read() (*serveSettings, error) {
	if s.fixed != nil {
		return s.fixed, s.fixed.tryFiles()
	}
	settings, err := readSettings(s.file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.file, err)
	}
	return settings, nil
}

// settingsFile is the content of the file of --config. Keys that must be told apart from
// missing ones are pointers.
type settingsFile struct {
	Listen   []string      `toml:"listen"`
	Certfile string        `toml:"certfile"`
	CAFile   string        `toml:"cafile"`
	Exports  []exportTable `toml:"export"`
}

type exportTable struct {
	Name        *string `toml:"name"`
	Path        string  `toml:"path"`
	ReadOnly    *bool   `toml:"read_only"`
	Description string  `toml:"description"`
}

// readSettings reads and checks a file of settings, and opens each of its exports once. The
// error has all mistakes, in one line, and the numbers of theirs.
func readSettings(path string) (*serveSettings, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	var f settingsFile
	meta, err := toml.Decode(string(data), &f)
	if err != nil {
		return nil, tomlfile.Error(err)
	}
	if err := tomlfile.Unknown(string(data), meta, f); err != nil {
		return nil, err
	}
	c := checker{text: string(data), meta: meta, headers: tomlfile.TableLines(string(data), "export")}
	return c.check(&f)
}

// withoutPath returns the cause of an error of package os, for messages that have the path.
func withoutPath(err error) error {
	var pathError *os.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}

// checker collects the mistakes in a file of settings.
type checker struct {
	text     string
	meta     toml.MetaData
	headers  []int // the line of each [[export]]
	mistakes []string
}

// addKey adds a mistake in the value of a key at the beginning of the file.
func (c *checker) addKey(key, format string, args ...any) {
	c.add(tomlfile.Line(c.text, toml.Key{key}), key+": "+format, args...)
}

// addExport adds a mistake in the export with this index.
func (c *checker) addExport(i int, format string, args ...any) {
	line := 0
	if i < len(c.headers) {
		line = c.headers[i]
	}
	c.add(line, "export: "+format, args...)
}

func (c *checker) add(line int, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if line > 0 {
		text = fmt.Sprintf("line %d: %s", line, text)
	}
	c.mistakes = append(c.mistakes, text)
}

// check returns the settings, or an error with all mistakes.
func (c *checker) check(f *settingsFile) (*serveSettings, error) {
	s := &serveSettings{listen: f.Listen, certfile: f.Certfile, cafile: f.CAFile}
	if !c.meta.IsDefined("listen") {
		s.listen = []string{defaultListen}
	}
	c.checkListen(s.listen)
	c.checkPath("certfile", s.certfile)
	c.checkPath("cafile", s.cafile)
	if s.cafile != "" && s.certfile == "" {
		c.addKey("cafile", "needs certfile: %v", errNoTLS)
	}
	if len(f.Exports) == 0 {
		c.add(0, "no [[export]]: nothing to serve")
	}
	for i, e := range f.Exports {
		s.exports = append(s.exports, c.checkExport(i, e))
	}
	c.checkPairs(s.exports)
	if c.mistakes != nil {
		return nil, errors.New(strings.Join(c.mistakes, "; "))
	}
	return s, nil
}

func (c *checker) checkListen(addrs []string) {
	if len(addrs) == 0 {
		c.addKey("listen", "no address")
	}
	for i, addr := range addrs {
		if _, _, err := listenaddr.Split(addr); err != nil {
			c.addKey("listen", "%v", err)
		}
		if slices.Contains(addrs[:i], addr) {
			c.addKey("listen", "%q is there twice", addr)
		}
	}
}

func (c *checker) checkPath(key, path string) {
	if path != "" && !filepath.IsAbs(path) {
		c.addKey(key, "want a path that begins with a slash, got %q", path)
	}
}

// checkExport checks one export without the others, and opens its file.
func (c *checker) checkExport(i int, e exportTable) export {
	x := export{path: e.Path, description: e.Description, writable: e.ReadOnly != nil && !*e.ReadOnly}
	if e.Name == nil {
		c.addExport(i, `no name; "" is the one of clients that ask for none`)
	} else if x.name = *e.Name; !isText(x.name) {
		c.addExport(i, "name %q: want at most %d bytes without control characters", x.name, wire.MaxString)
	}
	if !isText(x.description) {
		c.addExport(i, "description: want at most %d bytes without control characters", wire.MaxString)
	}
	switch {
	case x.path == "":
		c.addExport(i, "%q has no path", x.name)
	case !filepath.IsAbs(x.path):
		c.addExport(i, "path: want a path that begins with a slash, got %q", x.path)
	default:
		if err := x.try(); err != nil {
			c.addExport(i, "%v", err)
		}
	}
	return x
}

// isText reports whether clients accept s as a name or a description.
func isText(s string) bool {
	return len(s) <= wire.MaxString && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// checkPairs compares each export with those before it.
func (c *checker) checkPairs(exports []export) {
	for i, x := range exports {
		for _, other := range exports[:i] {
			if x.name == other.name {
				c.addExport(i, "name %q is there twice", x.name)
			}
			if x.writable && other.writable && x.storage != (storage{}) && x.storage.same(other.storage) {
				c.addExport(i, "%q and %q are the same file or device, and both writable", other.name, x.name)
			}
		}
	}
}

// tryFiles opens and closes the file of each export.
func (s *serveSettings) tryFiles() error {
	for i := range s.exports {
		if err := s.exports[i].try(); err != nil {
			return err
		}
	}
	return nil
}

// try opens and closes the file, to report an error before a client asks for the export. It
// sets storage.
func (x *export) try() error {
	d, err := x.open()
	if err != nil {
		return err
	}
	x.storage.own, x.storage.behind, err = storageOf(x.path)
	return errors.Join(err, d.Close())
}
