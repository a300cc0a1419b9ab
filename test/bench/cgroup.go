package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// cgroup is a folder of the cgroup file system, of either version, that limits the memory of
// its processes, page cache included.
type cgroup struct{ dir string }

// newCgroup makes a memory cgroup below that of this process, or below the nearest ancestor
// that allows it: version 2 allows none beside processes. The caller removes it.
func newCgroup(limit int64) (*cgroup, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	err = errors.New("no memory cgroups are mounted")
	for _, place := range cgroupPlaces(string(mounts), string(own)) {
		dir := filepath.Join(place.dir, fmt.Sprintf("nbd-bench-%d", os.Getpid()))
		if err = os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		if err = os.WriteFile(filepath.Join(dir, place.limitFile), []byte(strconv.FormatInt(limit, 10)), 0); err == nil {
			return &cgroup{dir}, nil
		}
		err = errors.Join(err, os.Remove(dir))
	}
	return nil, fmt.Errorf("no memory cgroup: %w", err)
}

// cgroupPlace is a folder in which a cgroup may be made, and the file of its limit.
type cgroupPlace struct{ dir, limitFile string }

// cgroupPlaces parses the contents of /proc/self/mounts and /proc/self/cgroup. For version 2
// it returns all ancestors.
func cgroupPlaces(mounts, own string) []cgroupPlace {
	var places []cgroupPlace
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		root, options := f[1], strings.Split(f[3], ",")
		switch {
		case f[2] == "cgroup" && slices.Contains(options, "memory"):
			places = append(places, cgroupPlace{filepath.Join(root, ownCgroup(own, "memory")), "memory.limit_in_bytes"})
		case f[2] == "cgroup2":
			for path := ownCgroup(own, ""); ; path = filepath.Dir(path) {
				places = append(places, cgroupPlace{filepath.Join(root, path), "memory.max"})
				if path == "/" {
					break
				}
			}
		}
	}
	return places
}

// ownCgroup returns the path in the hierarchy of a controller; "" is that of version 2.
func ownCgroup(own, controller string) string {
	for line := range strings.Lines(own) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && slices.Contains(strings.Split(f[1], ","), controller) {
			return filepath.Clean("/" + f[2])
		}
	}
	return "/"
}

// inCgroup returns a command that enters a cgroup and executes another command.
func inCgroup(dir string, argv []string) []string {
	return append([]string{"/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, dir}, argv...)
}

// remove removes the cgroup, whose processes must have ended. It retries for a moment,
// because the kernel may still count them.
func (c *cgroup) remove() error {
	const timeout = 5 * time.Second
	for begin := time.Now(); ; time.Sleep(retryPause) {
		err := os.Remove(c.dir)
		if err == nil || time.Since(begin) > timeout {
			return err
		}
	}
}
