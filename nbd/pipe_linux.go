package nbd

import (
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// pipe is a kernel buffer between a file and a socket: what is spliced through
// it is not copied. n bytes are in it.
type pipe struct {
	r, w int
	n    int
}

const (
	// pipeSize is asked for once for each pipe: the largest usual request. Where
	// the kernel's limit for unprivileged processes is in the way, two of half
	// the size do as well.
	pipeSize     = 2 << 20
	pipeSizeUser = 1 << 20
	// maxIdlePipes bounds the descriptors that wait for use.
	maxIdlePipes = 32
)

// pipes are those that nobody uses, last in first out, all empty.
var pipes struct {
	mu   sync.Mutex
	idle []*pipe
}

// getPipe returns an empty pipe. The caller gives it back with release.
func getPipe() (*pipe, error) {
	pipes.mu.Lock()
	if last := len(pipes.idle) - 1; last >= 0 {
		p := pipes.idle[last]
		pipes.idle = pipes.idle[:last]
		pipes.mu.Unlock()
		return p, nil
	}
	pipes.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	// Without success the pipe is as small as it is, and more of them are used.
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSizeUser)
	}
	return &pipe{r: fds[0], w: fds[1]}, nil
}

// release gives a pipe back. What is left in it goes with it: nobody may find it
// in his own reply.
func (p *pipe) release() {
	if p.n == 0 {
		pipes.mu.Lock()
		if len(pipes.idle) < maxIdlePipes {
			pipes.idle = append(pipes.idle, p)
			p = nil
		}
		pipes.mu.Unlock()
	}
	if p != nil {
		unix.Close(p.r)
		unix.Close(p.w)
	}
}

// closeIdlePipes gives the descriptors of unused pipes back.
func closeIdlePipes() {
	pipes.mu.Lock()
	idle := pipes.idle
	pipes.idle = nil
	pipes.mu.Unlock()
	for _, p := range idle {
		unix.Close(p.r)
		unix.Close(p.w)
	}
}

// pipeline is the data of one reply, in as many pipes as it takes.
type pipeline struct {
	pipes []*pipe
	n     int // bytes in all of them
}

func (l *pipeline) release() {
	for _, p := range l.pipes {
		p.release()
	}
	clear(l.pipes)
	l.pipes, l.n = l.pipes[:0], 0
}

// errNoPipe: bytes cannot be spliced here and have to be read.
var errNoPipe = io.ErrNoProgress

// fill takes n bytes at off from a file into the pipeline, all of them or none.
// errNoPipe means that there is no pipe to be had or that the file cannot be
// spliced; every other error is one of reading.
func (l *pipeline) fill(fd int, off int64, n int) error {
	for l.n < n {
		p, err := getPipe()
		if err != nil {
			l.release()
			return errNoPipe
		}
		l.pipes = append(l.pipes, p)
		if err := p.fill(fd, &off, n-l.n); err != nil {
			l.release()
			return err
		}
		l.n += p.n
	}
	return nil
}

// fill takes up to n bytes, as many as the pipe holds but at least one.
func (p *pipe) fill(fd int, off *int64, n int) error {
	for p.n < n {
		// The flag is about the pipe; the file is waited for.
		m, err := unix.Splice(fd, off, p.w, nil, n-p.n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && p.n > 0:
			return nil // full
		case err == unix.EAGAIN, err == unix.EINVAL, err == unix.ENOSYS:
			return errNoPipe
		case err != nil:
			return os.NewSyscallError("splice", err)
		case m == 0:
			return io.ErrUnexpectedEOF
		default:
			p.n += int(m)
		}
	}
	return nil
}
