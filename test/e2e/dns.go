package main

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	discoveryv1 "k8s.io/api/discovery/v1"
)

// serveDNS answers for the cluster's services, until ctx ends. It gives the
// addresses of the ready pods behind a service, not the service's own: without
// kube-proxy nobody answers there. So every service is what Kubernetes calls
// headless.
func serveDNS(ctx context.Context, client kubernetes.Interface) error {
	conn, err := net.ListenPacket("udp", hostIP+":53")
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			answer, err := answerDNS(ctx, client, buf[:n])
			if err == nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	return nil
}

// answerDNS answers a query, with an error only to one that cannot be read.
func answerDNS(ctx context.Context, client kubernetes.Interface, query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		return nil, errors.Join(err, errors.New("no question"))
	}
	q := m.Questions[0]
	reply := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true, RecursionDesired: m.RecursionDesired}, Questions: m.Questions}
	service, inCluster := strings.CutSuffix(q.Name.String(), ".svc.cluster.local.")
	addresses, known := endpoints(ctx, client, service)
	if !inCluster || !known {
		reply.RCode = dnsmessage.RCodeNameError
	} else if q.Type == dnsmessage.TypeA {
		for _, a := range addresses {
			reply.Answers = append(reply.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1},
				Body:   &dnsmessage.AResource{A: a},
			})
		}
	}
	return reply.Pack()
}

// endpoints are the addresses of NAME.NAMESPACE, and whether there is such a
// service.
func endpoints(ctx context.Context, client kubernetes.Interface, service string) (addresses [][4]byte, known bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	name, namespace, _ := strings.Cut(service, ".")
	if _, err := client.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
		return nil, false
	}
	slices, err := client.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + name})
	if err != nil {
		return nil, true
	}
	for _, s := range slices.Items {
		for _, e := range s.Endpoints {
			if ip := net.ParseIP(e.Addresses[0]).To4(); ip != nil && e.Conditions.Ready != nil && *e.Conditions.Ready {
				addresses = append(addresses, [4]byte(ip))
			}
		}
	}
	return addresses, true
}
