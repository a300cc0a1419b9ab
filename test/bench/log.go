package main

import (
	"path/filepath"
	"slices"
	"strings"
)

// topic is what a note is about.
type topic string

const (
	serverCommand topic = "servers"
	clientCommand topic = "clients"
	skipped       topic = "skipped"
	ciphers       topic = "ciphers"
)

// log is what the report says besides numbers: each thing once, in the order
// in which it came up.
type log map[topic][]string

// note reports whether it was new.
func (l *log) note(about topic, text string) bool {
	if *l == nil {
		*l = log{}
	}
	if slices.Contains((*l)[about], text) {
		return false
	}
	(*l)[about] = append((*l)[about], text)
	return true
}

// shown is a command line as the report has it: without what differs from run
// to run.
func (b *bench) shown(argv []string, port string) string {
	words := slices.Clone(argv)
	for i, w := range words {
		if i == 0 {
			w = filepath.Base(w)
			if words[0] == b.self {
				w = "bench"
			}
		}
		w = strings.ReplaceAll(w, b.dir, "$DIR")
		if b.diskDir != "" {
			w = strings.ReplaceAll(w, b.diskDir, "$DISK")
		}
		if b.images.loop != nil && w == b.images.loop.path {
			w = "$LOOP"
		}
		if port != "" {
			w = strings.ReplaceAll(w, host+":"+port, host+":$PORT")
			if w == port {
				w = "$PORT"
			}
		}
		words[i] = w
	}
	return strings.Join(words, " ")
}
