package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// killAddress is where the node's machine listens: whoever connects kills
// kubelet. The connection ends when the next one was started.
const killAddress = nodeIP + ":10001"

// kubeletRestarted kills kubelet while pods write, lets one of them go and
// come back afterwards, and looks whether writing was ever interrupted.
func (t *tester) kubeletRestarted(ctx context.Context) (string, error) {
	ticks, err := t.writes(ctx, "files")
	if err != nil {
		return "", err
	}
	begin := time.Now()
	conn, err := net.DialTimeout("tcp", killAddress, 10*time.Second)
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		return "", err
	}
	if err := errors.Join(conn.Close(), t.nodeBack(ctx, begin), t.returns(ctx, block())); err != nil {
		return "", err
	}
	return ticks(ctx)
}

// nodeBack waits until kubelet has become ready since a time.
func (t *tester) nodeBack(ctx context.Context, since time.Time) error {
	return t.await(ctx, patience, "kubelet", func(ctx context.Context) error {
		// Each one says once that it starts.
		events, err := t.client.CoreV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + nodeName + ",reason=Starting"})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if !e.LastTimestamp.Time.Before(since.Truncate(time.Second)) {
				return t.node.ready(ctx, since)
			}
		}
		return errors.New("it has not started again")
	})
}

// writes lets a pod write all the time from now on. What comes back stops that
// and fails where the pod has been restarted, a write has failed, or none came
// to its end for long.
func (t *tester) writes(ctx context.Context, pod string) (stop func(context.Context) (string, error), err error) {
	before, err := t.client.CoreV1().Pods(user).Get(ctx, pod, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	const loop = `rm -f /data/stop /data/ticks; ( while [ ! -e /data/stop ]; do date +%s >> /data/ticks && sync -d /data/ticks || date >> /tmp/failed; sleep 0.1; done ) > /dev/null 2>&1 < /dev/null &`
	if _, err := t.sh(ctx, pod, loop); err != nil {
		return nil, err
	}
	begin := time.Now()
	return func(ctx context.Context) (string, error) {
		took := time.Since(begin).Seconds()
		if _, err := t.sh(ctx, pod, "touch /data/stop; [ ! -e /tmp/failed ]"); err != nil {
			return "", fmt.Errorf("the pod could not write: %w", err)
		}
		out, err := t.sh(ctx, pod, "awk 'NR > 1 && $1 - last > gap { gap = $1 - last } { last = $1 } END { print NR, gap + 0 }' /data/ticks")
		if err != nil {
			return "", err
		}
		after, err := t.client.CoreV1().Pods(user).Get(ctx, pod, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		var n, gap int
		if _, err := fmt.Sscan(out, &n, &gap); err != nil {
			return "", fmt.Errorf("%q: %w", out, err)
		}
		detail := fmt.Sprintf("meanwhile the pod wrote %d times in %.0f s, with no more than %d s between", n, took, gap)
		if n < 2 || float64(gap) > max(10, took/2) {
			return detail, errors.New("the pod could not write for a while")
		}
		if container(before) != container(after) {
			return detail, fmt.Errorf("the pod's container was %s and is %s", container(before), container(after))
		}
		return detail, nil
	}, nil
}

func container(p *corev1.Pod) string {
	var ids []string
	for _, s := range p.Status.ContainerStatuses {
		ids = append(ids, s.ContainerID)
	}
	return strings.Join(ids, " ")
}
