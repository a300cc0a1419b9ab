// Package testevents reads the output of `go test -json`.
package testevents

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Event is a line of `go test -json`, see `go doc test2json`.
type Event struct {
	Action      string
	Package     string
	Test        string
	Elapsed     float64 // seconds
	Output      string
	FailedBuild string
}

// Read calls each for every event until in ends. It copies other lines, which go prints too,
// to other. An error is one of reading in.
func Read(in io.Reader, other io.Writer, each func(Event)) error {
	br := bufio.NewReader(in) // no Scanner: a test may print lines of any length
	for {
		line, err := br.ReadString('\n')
		if line != "" {
			var e Event
			if json.Unmarshal([]byte(line), &e) == nil && e.Action != "" {
				each(e)
			} else {
				fmt.Fprint(other, line)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the output of go test: %w", err)
		}
	}
}
