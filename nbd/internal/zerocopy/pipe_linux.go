package zerocopy

import (
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// pipe is a buffer in the kernel that holds n bytes on their way from a file to a socket.
// Data is spliced into it and out of it without being copied.
type pipe struct {
	r, w int
	n    int
}

const (
	// pipeSize is the capacity that each new pipe is given: the length of the largest
	// common request. Where the kernel's limit for unprivileged processes is lower, two
	// pipes of half the size are used.
	pipeSize     = 2 << 20
	pipeSizeUser = 1 << 20
	// maxIdlePipes bounds the pipes that are kept open for the next use.
	maxIdlePipes = 32
)

// idlePipes are the pipes that are not in use, all of them empty. The last one is used
// first.
var idlePipes struct {
	mu    sync.Mutex // guards pipes
	pipes []*pipe
}

// getPipe returns an empty pipe. The caller must release it.
func getPipe() (*pipe, error) {
	idlePipes.mu.Lock()
	if last := len(idlePipes.pipes) - 1; last >= 0 {
		p := idlePipes.pipes[last]
		idlePipes.pipes = idlePipes.pipes[:last]
		idlePipes.mu.Unlock()
		return p, nil
	}
	idlePipes.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	// If both calls fail the pipe has its default size, and a reply needs more pipes.
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSizeUser)
	}
	return &pipe{r: fds[0], w: fds[1]}, nil
}

// release keeps an empty pipe for the next use. It closes a pipe that is not empty:
// its data must not become part of another reply.
func (p *pipe) release() {
	if p.n == 0 {
		idlePipes.mu.Lock()
		if len(idlePipes.pipes) < maxIdlePipes {
			idlePipes.pipes = append(idlePipes.pipes, p)
			p = nil
		}
		idlePipes.mu.Unlock()
	}
	if p != nil {
		p.close()
	}
}

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

// CloseIdle closes the pipes that are kept for the next use.
func CloseIdle() {
	idlePipes.mu.Lock()
	idle := idlePipes.pipes
	idlePipes.pipes = nil
	idlePipes.mu.Unlock()
	for _, p := range idle {
		p.close()
	}
}

// Pipes holds data on its way from a File to a Sender, in as many pipes as are needed.
// The zero value is empty. It must not be used concurrently.
type Pipes struct {
	pipes []*pipe
	n     int // bytes that fill put into all of them
}

// Len returns the number of bytes that were put into the Pipes.
func (l *Pipes) Len() int { return l.n }

// Release empties the Pipes, which can then be filled again. Data that was not sent is
// lost.
func (l *Pipes) Release() {
	for _, p := range l.pipes {
		p.release()
	}
	clear(l.pipes)
	l.pipes, l.n = l.pipes[:0], 0
}

// ErrNoPipe means that data cannot be spliced and has to be read: the process may open no
// further pipe, or the file does not support splicing.
var ErrNoPipe = errors.New("the file cannot be spliced")

// fill reads n bytes at off of a file, all of them or none. Errors other than ErrNoPipe are
// errors of reading.
func (l *Pipes) fill(fd int, off int64, n int) error {
	for l.n < n {
		p, err := getPipe()
		if err != nil {
			l.Release()
			return ErrNoPipe
		}
		l.pipes = append(l.pipes, p)
		if err := p.fill(fd, &off, n-l.n); err != nil {
			l.Release()
			return err
		}
		l.n += p.n
	}
	return nil
}

// fill reads up to n bytes, as many as fit but at least one.
func (p *pipe) fill(fd int, off *int64, n int) error {
	for p.n < n {
		// SPLICE_F_NONBLOCK applies to the pipe only: the call waits for the file.
		m, err := unix.Splice(fd, off, p.w, nil, n-p.n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && p.n > 0:
			return nil // full
		case err == unix.EAGAIN, err == unix.EINVAL, err == unix.ENOSYS:
			return ErrNoPipe
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
