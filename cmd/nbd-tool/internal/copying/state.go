package copying

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// maxState is larger than the file of a state.
const maxState = 64 << 10

// stateVersion is the version of the file format.
const stateVersion = 1

// State is the record of a copy from which a later process can go on. It holds no secrets.
type State struct {
	Version     int   `json:"version"`
	Source      Ident `json:"source"`
	Destination Ident `json:"destination"`
	// Part describes the part of the source that is copied.
	Part string `json:"part"`
	// Before is the size in bytes of the destination before the copy.
	Before int64 `json:"size_before"`
	// Done is the offset up to which all is copied and flushed.
	Done int64 `json:"done"`
}

// Ident identifies an end.
type Ident struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

func (i Ident) String() string { return fmt.Sprintf("%s, %d bytes", i.Name, i.Size) }

// LoadState reads a state. It returns nil if the file does not exist.
func LoadState(path string) (*State, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxState)) // it may be an image, by mistake
	if err != nil {
		return nil, err
	}
	var s State
	if err := json.Unmarshal(text, &s); err != nil || s.Version != stateVersion {
		return nil, fmt.Errorf("%s is no record of a copy by this version", path)
	}
	return &s, nil
}

// Check returns an error unless a copy with the state now continues the one of s.
func (s *State) Check(now *State) error {
	switch {
	case s.Source != now.Source:
		return fmt.Errorf("the source is not the one of the interrupted copy: it is %v, and was %v", now.Source, s.Source)
	case s.Destination != now.Destination:
		return fmt.Errorf("the destination is not the one of the interrupted copy: it is %v, and was %v", now.Destination, s.Destination)
	case s.Part != now.Part:
		return fmt.Errorf("the interrupted copy was of %s, and not of %s", s.Part, now.Part)
	case s.Done < 0 || s.Done > s.Source.Size:
		return fmt.Errorf("the interrupted copy cannot have got to byte %d of %d", s.Done, s.Source.Size)
	}
	return nil
}

// TemporaryState returns the path to which the state is written before it is renamed to path.
func TemporaryState(path string) string { return path + ".new" }

// Save writes the state to a file, which has the old or the new content after a crash.
func (s *State) Save(path string) error {
	s.Version = stateVersion
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	temporary := TemporaryState(path)
	if err := writeDurably(temporary, append(text, '\n')); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// RemoveState removes the file of a state.
func RemoveState(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func writeDurably(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
