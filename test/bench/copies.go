package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// nbdcopy stands in tables in place of a server: in these cases the clients are compared, ours
// and nbdcopy, and both have our server.
const nbdcopy = "nbdcopy"

// The sparse file of these cases: so many times the size of the other images, with data in one
// MiB of each holeEvery.
const (
	holesTimes = 4
	holeEvery  = 16
)

// copyFunc copies an image with the client of a server's name, and returns how long that took.
type copyFunc func(ctx context.Context, b *bench, s *server, image string) (time.Duration, error)

// copyCases copy with nbd-tool and with nbdcopy between the same ends, each with its default
// settings. nbdcopy is told to flush at the end, as nbd-tool always does.
func copyCases() []testCase {
	var cases []testCase
	add := func(name string, e env, image func(context.Context, *bench) (string, error), copyIt copyFunc) {
		cases = append(cases, testCase{name: "copy/" + name, env: e, client: nbdcopy, run: func(ctx context.Context, b *bench, s *server) (sample, error) {
			path, err := image(ctx, b)
			if err != nil {
				return sample{}, err
			}
			return b.copyBetween(ctx, s, path, copyIt)
		}})
	}
	fullImage := func(ctx context.Context, b *bench) (string, error) { return b.images.path(ctx, fileImage) }
	holesImage := func(ctx context.Context, b *bench) (string, error) { return b.holes(ctx) }
	for _, e := range []env{{image: fileImage, device: copiedDevice}, {image: fileImage, device: copiedDevice, tls: true}} {
		suffix := "/clear"
		if e.tls {
			suffix = "/tls"
		}
		add("export-to-file"+suffix, e, fullImage, exportToFile)
		add("file-to-export"+suffix, e, fullImage, fileToExport)
		add("export-to-export"+suffix, e, fullImage, exportToExport)
		if !e.tls {
			add("sparse-export-to-file"+suffix, e, holesImage, exportToFile)
			add("sparse-file-to-export"+suffix, e, holesImage, fileToExport)
			add("sparse-export-to-export"+suffix, e, holesImage, exportToExport)
		}
	}
	return cases
}

// copyKinds are our server twice, under the names of the two clients.
func (b *bench) copyKinds() []kind {
	argv := func(l launch) []string { return b.oursArgs(b.builds[0], l) }
	return []kind{{name: b.builds[0].name, argv: argv}, {name: nbdcopy, argv: argv}}
}

// copyTarget is the file that copies are made to.
func (b *bench) copyTarget() string { return filepath.Join(b.dir, "copy.raw") }

// runCopy runs the client of a server's name.
func (b *bench) runCopy(ctx context.Context, s *server, from, to string) (time.Duration, error) {
	if s.name == nbdcopy {
		return b.runClient(ctx, b.programs[nbdcopy], "--flush", from, to)
	}
	return b.runClient(ctx, b.builds[0].tool, "copy", from, to)
}

func exportToFile(ctx context.Context, b *bench, s *server, image string) (time.Duration, error) {
	src, err := b.serveImage(ctx, s, image)
	if err != nil {
		return 0, err
	}
	defer src.stop()
	return b.runCopy(ctx, s, src.uri(src.addr), b.copyTarget())
}

func fileToExport(ctx context.Context, b *bench, s *server, image string) (time.Duration, error) {
	return b.copyToExport(ctx, s, image, image)
}

func exportToExport(ctx context.Context, b *bench, s *server, image string) (time.Duration, error) {
	src, err := b.serveImage(ctx, s, image)
	if err != nil {
		return 0, err
	}
	defer src.stop()
	return b.copyToExport(ctx, s, image, src.uri(src.addr))
}

// serveImage starts one more server like s, of another image. The caller stops it.
func (b *bench) serveImage(ctx context.Context, s *server, image string, flags ...string) (*server, error) {
	k := kind{name: s.name, argv: func(l launch) []string {
		argv := b.oursArgs(b.builds[0], l)
		return append(append(argv[:len(argv)-1:len(argv)-1], flags...), l.image)
	}}
	return b.startOnce(ctx, k, launch{env: s.env, image: image})
}

// copyToExport copies an image, from wherever it is read, to the server of an empty file.
func (b *bench) copyToExport(ctx context.Context, s *server, image, from string) (time.Duration, error) {
	st, err := os.Stat(image)
	if err != nil {
		return 0, err
	}
	f, err := os.Create(b.copyTarget())
	if err != nil {
		return 0, err
	}
	if err := errors.Join(f.Truncate(st.Size()), f.Close()); err != nil {
		return 0, err
	}
	dst, err := b.serveImage(ctx, s, b.copyTarget(), "--writable")
	if err != nil {
		return 0, err
	}
	defer dst.stop()
	return b.runCopy(ctx, s, from, dst.uri(dst.addr))
}

// copyBetween measures a copy, and compares its result with the image.
func (b *bench) copyBetween(ctx context.Context, s *server, image string, copyIt copyFunc) (sample, error) {
	defer os.Remove(b.copyTarget())
	took, err := copyIt(ctx, b, s, image)
	if err != nil {
		return sample{}, err
	}
	st, err := os.Stat(image)
	if err != nil {
		return sample{}, err
	}
	return sample{Bytes: st.Size(), Seconds: took.Seconds()}, sameFiles(image, b.copyTarget())
}

// holes returns the path of the sparse file. It makes the file if there is none.
func (b *bench) holes(ctx context.Context) (string, error) {
	path := filepath.Join(b.dir, "holes.img")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return path, err
	}
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	size := holesTimes * b.opts.size
	err = f.Truncate(size)
	src, p := randomBytes(), make([]byte, mib)
	for off := int64(0); off < size && err == nil; off += holeEvery * mib {
		if _, err = io.ReadFull(src, p); err == nil {
			_, err = f.WriteAt(p, off)
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}
	return path, errors.Join(err, f.Close())
}
